"""Tells on stderr how far a long piece of work is: one line that is drawn anew on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time

TERMINAL_EVERY_S = 0.2
PLAIN_EVERY_S = 10.0
BAR_WIDTH = 24


class ProgressLine:
    """`total` is the whole work in whatever `update` counts."""

    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._began = self._drawn = time.monotonic()
        self._first: int | None = None
        self._is_terminal = sys.stderr.isatty()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def update(self, done: int, what: str) -> None:
        """Draw if the last line is old enough or the work is done. The time left follows from the speed since the first
        update, so work that an earlier run did counts as done and not as fast."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        every_s = TERMINAL_EVERY_S if self._is_terminal else PLAIN_EVERY_S
        if now - self._drawn < every_s and done < self._total:
            return
        self._drawn = now
        share = done / self._total
        speed = (done - self._first) / (now - self._began)
        left = f"{duration((self._total - done) / speed)} left" if speed else "- left"
        line = f"{share:6.1%}  {what}  {left}"
        if self._is_terminal:
            filled = int(share * BAR_WIDTH)
            line = f"[{'=' * filled}{' ' * (BAR_WIDTH - filled)}]{line}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the line away; a summary follows."""
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 4.2 s."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"
