"""The five methods that a backend must have. Everything else has a default made of them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import psutil
import torch

from k2lite.backends.base import DONE, Backend, Capabilities, Event, Memory
from k2lite.quant.types import QuantTensor

from . import CAPABILITIES


class ExampleBackend(Backend):
    name: ClassVar[str] = "example"
    contract: ClassVar[int] = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def memory(self) -> Memory:
        ram = psutil.virtual_memory()
        return Memory(ram.total, ram.available)

    def alloc(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        """One row at a time, so that a row's bits do not depend on its neighbours."""
        if not len(x):
            return x.new_empty(0, weight.shape[0])
        values = weight.dequantize().numpy().astype(np.float64)
        rows = [values @ row for row in x.numpy().astype(np.float64)]
        return torch.from_numpy(np.stack(rows).astype(np.float32))
