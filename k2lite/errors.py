"""The exceptions a user of k2lite may meet; the tree is drawn and defined in quant/errors.py."""

from __future__ import annotations

from k2lite.quant.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    K2LiteError,
    MemoryPlanError,
    RequestError,
    TokenizerError,
)

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "K2LiteError",
    "MemoryPlanError",
    "RequestError",
    "TokenizerError",
]
