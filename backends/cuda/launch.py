"""Starting a kernel: one place, so that a test can see every launch with its arguments and compile it for other cards.

Knows no kernel. A kernel's name in capitals is decided when it is compiled, everything else when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Observer = Callable[["Launch"], None]


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid (programs along x, y, z), arguments in order, constants by name, warps of a program, and how
    many steps of a loop its loads run ahead."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_observer: Observer | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any
) -> None:
    """Start `kernel` on its tensors' device, behind what was started there before."""
    if _observer is not None:
        _observer(Launch(kernel, grid, arguments, constants, warps, stages))
    elif all(grid):
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


class observed:
    """Within it, launches are told to `observer` instead of being made."""

    def __init__(self, observer: Observer) -> None:
        self._next = observer

    def __enter__(self) -> None:
        global _observer
        _observer = self._next

    def __exit__(self, *_: object) -> None:
        global _observer
        _observer = None
