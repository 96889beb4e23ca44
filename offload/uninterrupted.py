"""Bookkeeping that Ctrl-C must not cut in two: the interrupt comes when it is whole.

Python raises KeyboardInterrupt between any two instructions of the main thread. A chat goes on after it, so a slot that
was taken from one list and not yet put on another would be lost for good.
"""

from __future__ import annotations

import signal
import threading
from contextlib import ContextDecorator
from types import FrameType, TracebackType
from typing import Any


class _Holding:
    """The handler inside of a block. `before` is the one outside."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.held: tuple[int, FrameType | None] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.held = self.held or (number, frame)


class uninterrupted(ContextDecorator):
    """Hold Ctrl-C back until the block is over. Other threads never get it. Blocks may be nested; none may wait."""

    def __init__(self) -> None:
        self._holding: _Holding | None = None

    def _recreate_cm(self) -> uninterrupted:
        return uninterrupted()  # of a decorated function: one for each call

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        before = signal.getsignal(signal.SIGINT)
        # ignored, or not Python's to handle, or held back by a block around this one
        if not callable(before) or isinstance(before, _Holding):
            return
        self._holding = _Holding(before)
        signal.signal(signal.SIGINT, self._holding)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        holding, self._holding = self._holding, None
        if holding is None:
            return
        signal.signal(signal.SIGINT, holding.before)
        if holding.held is not None:
            holding.before(*holding.held)
