"""What the Cambricon backend says of itself, without importing torch_mlu.

The vendor's weight-only product takes groups of 64, 128, 256 or 512: K2's groups of 32 are refused, with the recipe.
"""

from __future__ import annotations

from typing import Literal, get_args

from k2lite.quant.errors import RequestError

from ..base import Backend, Capabilities, Numerics
from ..spec import BackendSpec, Probe, probe_package

Prefill = Literal["dequantized", "w4a8"]
INTEGERS = frozenset({"int4_g64", "int4_g128", "int8_g128", "int8_channel"})
CAPABILITIES = Capabilities(
    formats=INTEGERS | {"bf16", "f16", "f32"},
    expert_formats=INTEGERS | {"bf16"},
    arithmetic="Cambricon, activations BF16, router, norms and attention float32; bits depend on the batch",
    dtypes=("bfloat16",),
    numerics=Numerics(linear_error=1e-2, vector_error=1e-5, batch_invariant=False),
)


def spec() -> BackendSpec:
    return BackendSpec(
        name="cambricon",
        contract=1,
        # below all others: what never ran on a chip is taken by name only
        priority=-3,
        capabilities=CAPABILITIES,
        probe=_probe,
        load=_load,
        evidence="emulated; not run on hardware",
        vendor_packages=("torch_mlu", "torch_mlu_ops"),
        accelerator=True,
    )


def _probe() -> Probe:
    from .mlu_device import probe

    torch_mlu = probe_package("torch_mlu", lambda module: Probe(True, f"torch_mlu {module.__version__}"))
    if not torch_mlu.ready:
        return torch_mlu
    return probe_package("torch_mlu_ops", lambda module: probe(torch_mlu.reason, module))


def _load(*, prefill: Prefill = "dequantized") -> Backend:
    """prefill: how the experts of a prompt multiply; see backend.py."""
    import importlib

    from .adapter import Operations
    from .backend import CambriconBackend
    from .mlu_device import MluRuntime

    if prefill not in get_args(Prefill):
        raise RequestError(f"prefill is {prefill!r}; known: {', '.join(get_args(Prefill))}")
    return CambriconBackend(MluRuntime(), Operations(importlib.import_module("torch_mlu_ops")), prefill=prefill)
