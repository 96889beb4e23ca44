"""k2lite runs Kimi-K2 on one workstation.

    import k2lite
    engine = k2lite.load("path/to/Kimi-K2-Instruct")

The names below are imported when they are first used, so that `import k2lite` and `k2lite --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from .engine import Chunk as Chunk, Engine as Engine, Sequence as Sequence
    from .loading import load as load
    from .sampling import SamplingParams as SamplingParams, Token as Token

__version__ = "0.1.0"

_HOMES = {
    "load": "k2lite.loading",
    "Engine": "k2lite.engine",
    "Sequence": "k2lite.engine",
    "Chunk": "k2lite.engine",
    "SamplingParams": "k2lite.sampling",
    "Token": "k2lite.sampling",
}
__all__ = ["Chunk", "Engine", "SamplingParams", "Sequence", "Token", "errors", "load"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("k2lite.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'k2lite' has no attribute {name!r}")
