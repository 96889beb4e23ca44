"""The CUDA backend: Triton's kernels over the memory, streams and copies that torch accelerators share.

Invariant: which bits a token gets depends on the card's generation (its matrix instructions), the formats and the
kernels' version, all three of which its arithmetic names. Not run on hardware.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ..base import Capabilities
from ..torch_device.backend import TorchDeviceBackend
from ..torch_device.cuda_runtime import CudaRuntime, generation
from .operations import TritonOperations
from .spec import CAPABILITIES


class CudaBackend(TritonOperations, TorchDeviceBackend):
    """Card number `index`."""

    name: ClassVar[str] = "cuda"

    def __init__(self, index: int = 0) -> None:
        super().__init__(CudaRuntime(index))
        self._capabilities = replace(CAPABILITIES, arithmetic=f"{CAPABILITIES.arithmetic}, {generation(index)}")

    def capabilities(self) -> Capabilities:
        return self._capabilities
