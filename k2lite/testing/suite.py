"""All cases in one list, and a run of them on one backend.

Never stops at a failure: a report of what fails is what a new backend needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from k2lite.backends.base import Backend
from k2lite.backends.spec import Device

from . import attention_cases, cache_cases, matrix_cases, memory_cases, model_cases, row_cases
from .case import Case
from .report import Report, make_report


def conformance_cases() -> list[Case]:
    """Every case; `Case.applies` says whether a backend's table claims it."""
    return list(_cases())


def _cases() -> Iterator[Case]:
    for part in (memory_cases, row_cases, matrix_cases, attention_cases, cache_cases, model_cases):
        yield from part.cases()


@torch.inference_mode()
def run_suite(backend: Backend, devices: Sequence[Device] = (), say: Callable[[str], None] | None = None) -> Report:
    """Run every case that the backend claims. `say` gets a line for each failure as it happens."""
    results = []
    can = backend.capabilities()
    for case in conformance_cases():
        if not case.applies(can):
            continue
        result = case.result(backend)
        if say is not None and not result.passed:
            say(f"{case}: {result.said}")
        results.append(result)
    return make_report(backend, devices, results)
