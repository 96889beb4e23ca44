"""Writes a packed copy before a model runs from it, and says so: it may take as long as reading the whole model.

Knows no bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from .byte_sizes import gib
from .offload.packed_copy import PackedCopy
from .progress import ProgressLine, duration


def write_copy(copy: PackedCopy, say: Callable[[str], None] | None) -> None:
    """Make what is missing. `say` gets a line before and one after; without it nothing is told. Raises RequestError,
    CheckpointError."""
    if say is None:
        copy.write()
        return
    say(f"writing a packed copy of the experts to {copy.folder}, {gib(copy.nbytes)}; a run that is cut off goes on")
    line = ProgressLine(copy.nbytes)
    try:
        copy.write(line.update)
    finally:
        line.close()
    say(f"wrote {copy.folder} in {duration(line.elapsed_s)}")
