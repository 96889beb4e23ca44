"""What the CPU backend says of itself. Imports no kernel, so that listing backends compiles nothing."""

from __future__ import annotations

from pathlib import Path

from k2lite.backends.base import Backend, Capabilities, Numerics
from k2lite.backends.processor import processor
from k2lite.backends.spec import BackendSpec, Probe, probe_package
from k2lite.quant.formats import FORMAT_NAMES

KERNEL_VERSION = 1


def capabilities(activations: str = "int8") -> Capabilities:
    """Every format that `quantize` writes. Inputs of integer weights are rounded to 8 bits: 2.2e-2 is the worst of the
    suite's cases, an outlier among its group."""
    return Capabilities(
        formats=frozenset(FORMAT_NAMES),
        arithmetic=f"cpu kernels {KERNEL_VERSION}, {activations} activations",
        numerics=Numerics(linear_error=3e-2),
    )


def spec() -> BackendSpec:
    return BackendSpec(
        name="cpu",
        contract=1,
        priority=10,
        capabilities=capabilities(),
        probe=_probe,
        load=_load,
        report=Path(__file__).with_name("report.json"),
    )


def _probe() -> Probe:
    return probe_package(
        "numba", lambda numba: Probe(True, "kernels in Numba", (processor(f"numba {numba.__version__}"),))
    )


def _load(*, activations: str = "int8", threads: int | None = None) -> Backend:
    from .backend import CpuBackend

    return CpuBackend(activations=activations, threads=threads)
