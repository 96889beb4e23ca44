"""How a backend introduces itself before anything of its vendor is imported: name, contract, table, probe, loader.

A package offers one through the entry-point group `k2lite.backends`: the entry's name is the backend's, its value a
function without arguments that returns a BackendSpec. The module that holds this function must not import the vendor's
package; `probe` and `load` may.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Backend, Capabilities


@dataclass(frozen=True)
class Device:
    """One thing that multiplies: what it is, what drives it, and its memory in bytes (None: not known)."""

    name: str
    driver: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Probe:
    """Whether a backend can work here. `reason` says what it found, or exactly what is missing; `error` is the
    exception behind that, if there was one."""

    ready: bool
    reason: str
    devices: tuple[Device, ...] = ()
    error: BaseException | None = None


@dataclass(frozen=True)
class BackendSpec:
    """contract: the number in k2lite.backends.base that it was written for, as a literal. priority: `auto` takes the
    ready one with the highest. capabilities: the table that plans are made from, also on machines without the device;
    a loaded backend may narrow it. probe: never raises for what is missing. load: its
    keyword arguments, all with defaults, are the backend's own options. evidence: what stands behind it while no
    `report` of the conformance suite from hardware does ("emulated", "interpreter-tested", "not tested").
    vendor_packages: what discovery must not import. accelerator: it has memory of its own, and a backend of the
    processor works beside it."""

    name: str
    contract: int
    priority: int
    capabilities: Capabilities
    probe: Callable[[], Probe]
    load: Callable[..., Backend]
    evidence: str = "not tested"
    report: Path | None = None
    vendor_packages: tuple[str, ...] = ()
    accelerator: bool = False

    def evidence_text(self) -> str:
        """What shows that it works: the shipped report of a passed run on hardware, or what is said without one."""
        if self.report is None or not self.report.is_file():
            return self.evidence
        facts: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8"))
        if not facts["passed"]:
            return f"{self.evidence}; the suite failed on hardware ({facts['date']})"
        device = facts["device"]
        return f"ran on hardware ({facts['date']}, {device['name']}, {device['driver']})"


def probe_package(package: str, found: Callable[[Any], Probe]) -> Probe:
    """Import a vendor's package if it is there at all, and let `found` look at the module. What an import raises is
    kept as it was: a library that it misses is named in there."""
    try:
        present = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        present = False
    if not present:
        return Probe(False, f"the package {package} is not installed")
    try:
        module = importlib.import_module(package)
    except Exception as error:
        return Probe(False, f"the package {package} is installed and can't be imported: {_said(error)}", error=error)
    return found(module)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
