"""Gives experts' memory back when the machine runs short, so that nothing is swapped out and nobody is killed.

The plan left room; this is for what others take afterwards. Looks at most once a second. Changes speed, never tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from k2lite.backends.base import Memory
from k2lite.offload.source import ExpertSource

# Short is less than a hundredth of the machine's memory (of the control group's, where that is less), at most this.
MAX_FLOOR_BYTES = 512 << 20
EVERY_S = 1.0


class MemoryGuard:
    """`memory` says what is available now; `slot_bytes` is what one expert gives back."""

    def __init__(self, memory: Callable[[], Memory], experts: ExpertSource, slot_bytes: int) -> None:
        self._memory = memory
        self._experts = experts
        self._slot_bytes = slot_bytes
        self._last_s = time.monotonic()
        self._said = False

    def check(self, *, now_s: float | None = None) -> int:
        """Look, and give back what is short; how many experts lost their room."""
        now_s = time.monotonic() if now_s is None else now_s
        if now_s - self._last_s < EVERY_S:
            return 0
        self._last_s = now_s
        memory = self._memory()
        short = min(MAX_FLOOR_BYTES, memory.total_bytes // 100) - memory.available_bytes
        if short <= 0:
            return 0
        given = self._experts.shrink(-(-short // self._slot_bytes))
        if given and not self._said:
            self._said = True
            print(
                f"k2lite: memory is short ({memory.available_bytes >> 20} MiB left): giving experts' memory back, "
                "more will be read from the drive",
                file=sys.stderr,
            )
        return given
