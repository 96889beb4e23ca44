"""The CPU backend: hands the model's operations to kernels, keeps no weights.

Invariant: a token's result has the same bits for any batch, chunk, thread count and instruction set.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from k2lite.backends.base import DONE, Backend, Capabilities, Event, Memory
from k2lite.backends.host_memory import host_memory
from k2lite.quant.errors import RequestError
from k2lite.quant.formats import FORMAT_NAMES
from k2lite.quant.types import QuantTensor

from .activations import prepare, prepared_bytes
from .compiler import compile_all
from .compute_team import ComputeTeam
from .int_linear import ROWS
from .matrix import IN, OUT, matrix_fields, preparation
from .multiply import linear_rows, multiply, multiply_scratch_bytes

ACTIVATIONS = ("int8", "bf16")
KERNEL_VERSION = 1


class CpuBackend(Backend):
    """activations: what inputs of integer weights are rounded to. threads: by default what the process may use."""

    name: ClassVar[str] = "cpu"

    def __init__(self, *, activations: str = "int8", threads: int | None = None) -> None:
        if activations not in ACTIVATIONS:
            raise RequestError(f"activations is {activations!r}; known: {', '.join(ACTIVATIONS)}")
        self.device = torch.device("cpu")
        self._rounded = activations == "bf16"
        self._activations = activations
        self._team = ComputeTeam(threads)
        compile_all()

    @property
    def threads(self) -> int:
        return self._team.threads

    def capabilities(self) -> Capabilities:
        arithmetic = f"cpu kernels {KERNEL_VERSION}, {self._activations} activations"
        return Capabilities(formats=frozenset(FORMAT_NAMES), arithmetic=arithmetic)

    def memory(self) -> Memory:
        return host_memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        x = _rows(x)
        out = torch.empty(len(x), weight.shape[0])
        if not out.numel():
            return out
        fields = matrix_fields(weight, self._rounded)
        matrix = np.array(fields, np.int64)
        prepared = self._prepare(x, preparation(fields, self._rounded))
        tokens, outputs = addresses(prepared), addresses(out)
        arguments = [multiply.address, matrix.ctypes.data, tokens.ctypes.data, len(x), outputs.ctypes.data]
        tasks = -(-fields[OUT] // ROWS)
        self._team.launch(linear_rows, arguments, tasks, multiply_scratch_bytes(fields[IN]))
        return out

    def _prepare(self, x: torch.Tensor, how: int) -> torch.Tensor:
        """Each row of x as kernels take it: uint8 [T, bytes]."""
        prepared = torch.empty(len(x), prepared_bytes(x.shape[1], how), dtype=torch.uint8)
        rows = addresses(x)
        arguments = [rows.ctypes.data, x.shape[1], prepared.data_ptr(), prepared.shape[1], how]
        self._team.launch(prepare, arguments, len(x))
        return prepared


def _rows(x: torch.Tensor) -> torch.Tensor:
    """float32 with contiguous rows."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()


def addresses(rows: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where each row of a matrix begins."""
    step = rows.stride(0) * rows.element_size()
    return rows.data_ptr() + step * np.arange(len(rows), dtype=np.int64)
