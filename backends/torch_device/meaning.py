"""What an exception of torch's says of a device, and our own error that tells what to do.

Invariant: what is not known is passed on as it is. Knows the types and words that all vendors share, and no vendor.
"""

from __future__ import annotations

from typing import Literal

import torch

Meaning = Literal["out of memory", "lost"]


def meaning_of(error: BaseException) -> Meaning | None:
    """A device's asynchronous error is sticky, every later call meets it: all but a shortage of memory mean that the
    device is lost to this process."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" if "out of memory" in str(error).lower() else "lost"
    return None
