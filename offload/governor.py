"""How many guesses a layer may have read ahead: fewer when they are wasted, none when most are, then a probe.

Knows counts only.
"""

from __future__ import annotations

from .source import PrefetchCounters

WINDOW_TOKENS = 32
# Below this share of guesses that were asked for, reading ahead costs more than it hides.
MIN_PRECISION, GOOD_PRECISION = 0.6, 0.75
# After this long with nothing read ahead, one guess a layer shows whether it pays again.
PROBE_TOKENS = 512


class PrefetchGovernor:
    """`width` guesses a layer at most; 0 switches reading ahead off for good."""

    def __init__(self, width: int, counters: PrefetchCounters) -> None:
        self.width = width
        self._most = width
        self._counters = counters
        self._tokens = 0
        self._issued = self._used = 0

    @property
    def allows_any(self) -> bool:
        """Whether reading ahead was asked for at all."""
        return self._most > 0

    def token_over(self) -> None:
        """Called once a token."""
        self._tokens += 1
        if not self._most:
            return
        if not self.width:
            if self._tokens >= PROBE_TOKENS:
                self._begin_window(width=1)
            return
        if self._tokens < WINDOW_TOKENS:
            return
        used = self._counters.useful + self._counters.late
        issued = self._counters.issued - self._issued
        precision = (used - self._used) / issued if issued else 1.0
        if precision < MIN_PRECISION:
            self._begin_window(width=self.width // 2)
        elif precision >= GOOD_PRECISION:
            self._begin_window(width=min(self._most, self.width + 1))
        else:
            self._begin_window(width=self.width)

    def _begin_window(self, width: int) -> None:
        self.width = width
        self._tokens = 0
        self._issued = self._counters.issued
        self._used = self._counters.useful + self._counters.late
