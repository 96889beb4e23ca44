"""The stand-in device under a name, for tests that go through the command line: put this module into BUILT_IN."""

from __future__ import annotations

from k2lite.backends.reference import ReferenceBackend
from k2lite.backends.spec import BackendSpec, Probe

from .engines import StandInBackend


def spec() -> BackendSpec:
    return BackendSpec(
        name=StandInBackend.name,
        contract=1,
        priority=-9,
        capabilities=ReferenceBackend().capabilities(),
        probe=lambda: Probe(True, "tests"),
        load=StandInBackend,
        accelerator=True,
    )
