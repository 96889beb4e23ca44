"""The CUDA backend's operations on the processor, in Triton's interpreter. tests/conftest.py turns it on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton.runtime.interpreter as interpreter

from k2lite.backends.base import DONE, Capabilities, Event, Memory
from k2lite.backends.cuda.operations import TritonOperations
from k2lite.backends.cuda.spec import CAPABILITIES
from k2lite.backends.host_memory import host_memory

_patch_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    """numpy 2.4 turns no array of one number into an int; triton 3.6 asks it to wherever a loop has a bound."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_index


class InterpretedBackend(TritonOperations):
    name: ClassVar[str] = "cuda, interpreted"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def memory(self) -> Memory:
        return host_memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE
