"""A case of the suite: one operation on one kind of input, judged by what the backend itself promises."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from k2lite.backends.base import Backend, Capabilities

from .report import CaseResult


class WrongError(Exception):
    """What a backend did is not what the seam says; the text tells how."""


@dataclass(frozen=True)
class Measured:
    """The largest error of a case, and the bound that the backend's numerics set for it."""

    error: float
    bound: float


def always(can: Capabilities) -> bool:  # noqa: ARG001
    return True


@dataclass(frozen=True)
class Case:
    """`check` returns what it measured, None where bits were compared, or raises WrongError. `applies` tells from the
    table whether the backend claims this at all."""

    operation: str
    name: str
    check: Callable[[Backend], Measured | None]
    applies: Callable[[Capabilities], bool] = always

    def __str__(self) -> str:
        return f"{self.operation}: {self.name}"

    def result(self, backend: Backend) -> CaseResult:
        """Run it. Whatever the backend raises is a failure of the case with the exception's text."""
        try:
            measured = self.check(backend)
        except WrongError as error:
            return CaseResult(self.operation, self.name, False, None, None, str(error))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            said = f"raised {type(error).__name__}: {error} ({at.name}, line {at.lineno})"
            return CaseResult(self.operation, self.name, False, None, None, said)
        if measured is None:
            return CaseResult(self.operation, self.name, True, None, None)
        passed = measured.error <= measured.bound
        said = "" if passed else f"error {measured.error:.3g}, and its numerics allow {measured.bound:.3g}"
        return CaseResult(self.operation, self.name, passed, measured.error, measured.bound, said)

    def run(self, backend: Backend) -> None:
        """For a test: does nothing where the backend does not claim this, raises AssertionError where it fails."""
        if self.applies(backend.capabilities()):
            result = self.result(backend)
            assert result.passed, f"{self}: {result.said}"


def demand(holds: bool, otherwise: str) -> None:
    """Raise WrongError unless it `holds`."""
    if not holds:
        raise WrongError(otherwise)
