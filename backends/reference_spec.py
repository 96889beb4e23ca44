"""What the reference backend says of itself."""

from __future__ import annotations

from pathlib import Path

import torch

from .base import Backend
from .processor import processor
from .reference import ReferenceBackend
from .spec import BackendSpec, Probe


def spec() -> BackendSpec:
    return BackendSpec(
        name="reference",
        contract=1,
        priority=0,
        capabilities=ReferenceBackend().capabilities(),
        probe=lambda: Probe(True, "plain torch on the processor", (processor(f"torch {torch.__version__}"),)),
        load=_load,
        report=Path(__file__).with_name("reference_report.json"),
    )


def _load() -> Backend:
    return ReferenceBackend()
