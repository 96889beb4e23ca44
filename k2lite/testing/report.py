"""What a run of the suite found: one line a case, and all that a reader must know to believe it. JSON on request."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from k2lite import __version__
from k2lite.backends.base import CONTRACT, Backend
from k2lite.backends.spec import Device


@dataclass(frozen=True)
class CaseResult:
    """error and bound: the largest error of the case against float64 and what the backend's own numerics allow, both
    relative (see the oracle); None where a case is a matter of bits. said: what is wrong, empty if nothing."""

    operation: str
    case: str
    passed: bool
    error: float | None
    bound: float | None
    said: str = ""


@dataclass(frozen=True)
class Report:
    backend: str
    contract: int
    arithmetic: str
    numerics: dict[str, Any]
    device: dict[str, Any]
    cases: tuple[CaseResult, ...]
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat())

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)

    def as_json(self) -> str:
        """The object with a line for each case, so that two reports can be compared by eye."""
        cases = ",\n  ".join(json.dumps(_described(case)) for case in self.cases)
        head = json.dumps({**self.as_dict(), "cases": []}, indent=1)
        return head.replace('"cases": []', f'"cases": [\n  {cases}\n ]') + "\n"

    def as_dict(self) -> dict[str, Any]:
        """What --report writes."""
        return {
            "backend": self.backend,
            "passed": self.passed,
            "date": self.date,
            "device": self.device,
            "k2lite": __version__,
            "contract": self.contract,
            "arithmetic": self.arithmetic,
            "numerics": self.numerics,
            "python": platform.python_version(),
            "torch": version("torch"),
            "system": f"{platform.system()} {platform.machine()}",
            "cases": [_described(case) for case in self.cases],
        }


def _described(case: CaseResult) -> dict[str, Any]:
    """A case as JSON has it: an error without bound, which JSON has no number for, is null, and `said` tells."""
    error = case.error if case.error is not None and math.isfinite(case.error) else None
    return {**asdict(case), "error": error}


def make_report(backend: Backend, devices: Sequence[Device], cases: Sequence[CaseResult]) -> Report:
    can = backend.capabilities()
    device = asdict(devices[0]) if devices else {"name": str(backend.device), "driver": f"torch {torch.__version__}"}
    return Report(backend.name, CONTRACT, can.arithmetic, asdict(can.numerics), device, tuple(cases))
