"""What the Ascend backend says of itself, without importing torch_npu.

Formats follow the vendor's tables: integer codes of 4 bits in any group, of 8 bits by group in the trunk and by row for
experts, BF16. FP8 in blocks has no operation on the chips that these schemas are for.
"""

from __future__ import annotations

from types import ModuleType

from ..base import Backend, Capabilities, Numerics
from ..spec import BackendSpec, Probe, probe_package

INT4 = frozenset({"int4_g32", "int4_g64", "int4_g128"})
CAPABILITIES = Capabilities(
    formats=INT4 | {"int8_g128", "int8_channel", "bf16", "f16", "f32"},
    expert_formats=INT4 | {"int8_channel", "bf16"},
    arithmetic="Ascend, activations BF16, router and norms float32; bits depend on the batch",
    dtypes=("bfloat16",),
    numerics=Numerics(linear_error=1e-2, vector_error=1e-5, batch_invariant=False),
)


def spec() -> BackendSpec:
    return BackendSpec(
        name="ascend",
        contract=1,
        # below all others: what never ran on a chip is taken by name only
        priority=-2,
        capabilities=CAPABILITIES,
        probe=_probe,
        load=_load,
        evidence="emulated; not run on hardware",
        vendor_packages=("torch_npu",),
        accelerator=True,
    )


def _probe() -> Probe:
    return probe_package("torch_npu", _found)


def _found(torch_npu: ModuleType) -> Probe:
    from .npu_device import probe
    from .schemas import differences, installed

    version = f"torch_npu {torch_npu.__version__}"
    wrong = differences(installed())
    if wrong:
        return Probe(False, f"{version} declares operations otherwise than k2lite knows them: {'; '.join(wrong)}")
    return probe(version)


def _load() -> Backend:
    from .backend import AscendBackend
    from .npu_device import NpuRuntime

    return AscendBackend(NpuRuntime())
