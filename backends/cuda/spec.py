"""What the CUDA backend says of itself, without importing Triton or asking for a card."""

from __future__ import annotations

from types import ModuleType

from k2lite.quant.formats import FORMAT_NAMES

from ..base import Backend, Capabilities, Numerics
from ..spec import BackendSpec, Probe, probe_package

KERNEL_VERSION = 2
TRITON = "3.6.0"  # what the kernels were tested with; others may compile them otherwise

# Activations are rounded to BF16 (2e-3 of a row), once more between the matrices of a block. Routers, norms, rotation
# and sums keep float32. Largest of the suite's cases in the interpreter: 2.8e-3, a row of one number.
CAPABILITIES = Capabilities(
    formats=frozenset(FORMAT_NAMES),
    arithmetic=f"cuda kernels {KERNEL_VERSION}, bf16 activations",
    dtypes=("bfloat16", "float32"),
    numerics=Numerics(linear_error=4e-3),
)


def spec() -> BackendSpec:
    return BackendSpec(
        name="cuda",
        contract=1,
        # below every backend that ran on hardware, until this one has: it is taken by name only
        priority=-2,
        capabilities=CAPABILITIES,
        probe=_probe,
        load=_load,
        evidence="interpreter-tested, not run on hardware",
        accelerator=True,
        vendor_packages=("triton",),
    )


def _probe() -> Probe:
    kernels = probe_package("triton", _found)
    if not kernels.ready:
        return kernels
    from ..torch_device.cuda_runtime import probe

    return probe()


def _found(triton: ModuleType) -> Probe:
    version = str(triton.__version__)
    if version != TRITON:
        return Probe(False, f"triton is {version}, and the kernels need {TRITON}: pip install 'k2lite[cuda]'")
    return Probe(True, f"triton {version}")


def _load() -> Backend:
    from .backend import CudaBackend

    return CudaBackend()
