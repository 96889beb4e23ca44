"""The exceptions a user of k2lite may meet, and how a command says one; the tree is defined in quant/errors.py."""

from __future__ import annotations

from k2lite.quant.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    DeviceLostError,
    DeviceMemoryError,
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
    "DeviceLostError",
    "DeviceMemoryError",
    "K2LiteError",
    "MemoryPlanError",
    "RequestError",
    "TokenizerError",
    "one_line",
]


def one_line(error: object) -> str:
    """The text of an error with its line breaks made spaces, whatever a file or a template put into it."""
    return " ".join(str(error).splitlines())
