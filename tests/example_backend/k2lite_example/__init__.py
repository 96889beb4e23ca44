"""The example backend's introduction: what `k2lite backends` and `--backend example` read.

Imports no vendor package; here the "vendor" is numpy, which `probe` and `load` may import.
"""

from __future__ import annotations

from types import ModuleType

from k2lite.backends.base import Backend, Capabilities
from k2lite.backends.processor import processor
from k2lite.backends.spec import BackendSpec, Probe, probe_package

CAPABILITIES = Capabilities(
    formats=frozenset({"bf16", "f16", "f32", "int4_g32", "int8_channel", "fp8_e4m3_b128"}),
    arithmetic="example: float64 products in numpy",
    dtypes=("float64",),
)


def spec() -> BackendSpec:
    return BackendSpec(
        name="example",
        contract=1,  # the contract this package was written for: a number, never k2lite's own constant
        priority=-1,
        capabilities=CAPABILITIES,
        probe=_probe,
        load=_load,
        vendor_packages=("numpy",),
    )


def _probe() -> Probe:
    return probe_package("numpy", _found)


def _found(numpy: ModuleType) -> Probe:
    version = f"numpy {numpy.__version__}"
    return Probe(True, version, (processor(version),))


def _load() -> Backend:
    from .backend import ExampleBackend

    return ExampleBackend()
