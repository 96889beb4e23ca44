"""What the ONNX Runtime backend says of itself, without importing ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..base import Backend, Capabilities, Numerics
from ..processor import processor
from ..spec import BackendSpec, Probe, probe_package

PROVIDER = "CPUExecutionProvider"
# FP8 in blocks has no kernel there.
CAPABILITIES = Capabilities(
    formats=frozenset({"bf16", "f16", "f32", "int4_g32", "int4_g64", "int4_g128", "int8_g128", "int8_channel"}),
    arithmetic="ONNX Runtime CPU, float32; bits depend on the chunk",
    numerics=Numerics(linear_error=2e-6, vector_error=1e-6, batch_invariant=False),
)


def spec() -> BackendSpec:
    return BackendSpec(
        name="onnx",
        contract=1,
        # below the reference backend: its bits depend on the chunk, so it is taken by name only
        priority=-1,
        capabilities=CAPABILITIES,
        probe=_probe,
        load=_load,
        report=Path(__file__).with_name("report.json"),
        vendor_packages=("onnx", "onnxruntime"),
    )


def _probe() -> Probe:
    graphs = probe_package("onnx", lambda _: Probe(True, "its graphs are made with onnx"))
    return probe_package("onnxruntime", _found) if graphs.ready else graphs


def _found(onnxruntime: ModuleType) -> Probe:
    version = f"onnxruntime {onnxruntime.__version__}"
    if PROVIDER not in onnxruntime.get_available_providers():
        return Probe(False, f"{version} has no {PROVIDER}")
    return Probe(True, f"{version}, {PROVIDER}", (processor(version),))


def _load() -> Backend:
    from .backend import OnnxBackend

    return OnnxBackend()
