"""NVIDIA's cards through torch.cuda: whether one can work here, and what the shared runtime lacks.

The only file that names torch.cuda. Not run on hardware.
"""

from __future__ import annotations

from typing import Any

import torch

from k2lite.backends.spec import Device, Probe

from .module_runtime import ModuleRuntime

# BF16 arithmetic and asynchronous copies into shared memory: Ampere. Triton's kernels need both.
OLDEST = (8, 0)


class CudaRuntime(ModuleRuntime):
    """Card number `index`."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(torch.cuda, "cuda", index)

    def pin(self, memory: torch.Tensor) -> None:
        code = int(_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        # "already registered" (712) too: whoever did that may have locked other pages at the same address
        if code:
            raise OSError(f"cudaHostRegister of {memory.nbytes} bytes failed with error {code} (see ulimit -l)")

    def unpin(self, memory: torch.Tensor) -> None:
        code = int(_runtime().cudaHostUnregister(memory.data_ptr()))
        if code:
            raise RuntimeError(f"cudaHostUnregister failed with error {code}")


def generation(index: int = 0) -> str:
    """A card's instruction set, as compilers name it: matrix instructions of two generations may sum otherwise."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def probe(cuda: Any = torch.cuda, built_for: str | None = torch.version.cuda) -> Probe:
    """Whether a card can work here, or what is missing and what to do. `cuda` is torch's module, `built_for` the CUDA
    version that torch was built for."""
    if built_for is None:
        return Probe(
            False,
            f"torch {torch.__version__} was built without CUDA; install a build with it, as pytorch.org says for your "
            "driver, and k2lite[cuda]",
        )
    try:
        count = cuda.device_count()
        if count:
            cuda.init()
    except Exception as error:
        # torch says which of driver and build is the older
        return Probe(
            False,
            f"driver and torch (built for CUDA {built_for}) don't agree: {_first_line(error)}; install a newer driver, "
            "or a torch for an older CUDA",
            error=error,
        )
    if not count:
        return Probe(
            False,
            f"torch {torch.__version__} (CUDA {built_for}) finds no NVIDIA card; nvidia-smi must list one, and "
            "CUDA_VISIBLE_DEVICES must not hide it",
        )
    name, capability = cuda.get_device_name(0), tuple(cuda.get_device_capability(0))
    if capability < OLDEST:
        return Probe(
            False,
            f"{name} has compute capability {capability[0]}.{capability[1]}, and the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} (Ampere, RTX 30) or newer; --backend cpu runs without the card",
        )
    memory = int(cuda.get_device_properties(0).total_memory)
    others = f"; {count - 1} more are not used" if count > 1 else ""
    return Probe(True, f"{name}{others}", (Device(name, f"CUDA {built_for}, torch {torch.__version__}", memory),))


def _runtime() -> Any:
    """The few calls of the CUDA runtime that torch hands through."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
