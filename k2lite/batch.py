"""How several sequences' tokens share one step: their rows in a ragged batch, in order, without padding."""

from __future__ import annotations

from dataclasses import dataclass

from .kv_cache import LatentCache


@dataclass(frozen=True)
class BatchRow:
    """Rows [start, stop) of the batch: the next tokens of one sequence."""

    start: int
    stop: int
    cache: LatentCache

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def position(self) -> int:
        """Where in its sequence the first of these tokens stands."""
        return self.cache.length
