"""Names to backends: our own, and those that installed packages offer under the entry-point group `k2lite.backends`.

Discovery imports no vendor's package; a named backend is that one or an error; `auto` says which it took and why.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from k2lite.quant.errors import BackendError, K2LiteError, RequestError

from .base import CONTRACT, Backend
from .spec import BackendSpec, Probe

# Each module holds a function `spec`.
BUILT_IN = {
    "cpu": "k2lite.backends.cpu.spec",
    "reference": "k2lite.backends.reference_spec",
    "onnx": "k2lite.backends.onnx.spec",
    "ascend": "k2lite.backends.ascend.spec",
    "cambricon": "k2lite.backends.cambricon.spec",
    "cuda": "k2lite.backends.cuda.spec",
}
AUTO = "auto"
GROUP = "k2lite.backends"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A backend that was discovered: its spec, or why it has none."""

    name: str
    spec: BackendSpec | None
    error: Exception | None = None

    def probe(self) -> Probe:
        """What its own probe says, after the contract; a probe that raises is a reason, not a crash."""
        try:
            return self.checked_spec().probe()
        except BackendError as error:
            return Probe(False, str(error), error=error.__cause__ or error)
        except Exception as error:
            return Probe(False, f"its probe failed: {type(error).__name__}: {error}", error=error)

    def checked_spec(self) -> BackendSpec:
        """The spec, if it is one and of our contract. Raises BackendError."""
        if self.spec is None:
            raise BackendError(
                f"backend {self.name} can't be read: {type(self.error).__name__}: {self.error}"
            ) from self.error
        demand_contract(self.name, self.spec.contract)
        return self.spec


def backend_names() -> tuple[str, ...]:
    """Every name there is, ours first, without importing anything for it."""
    ours = tuple(BUILT_IN)
    return (*ours, *sorted({entry.name for entry in entry_points(group=GROUP)} - set(ours)))


def find(name: str) -> Found:
    """The backend called `name`. Raises BackendError if there is none."""
    try:
        if name in BUILT_IN:
            return Found(name, importlib.import_module(BUILT_IN[name]).spec())
        entries = [entry for entry in entry_points(group=GROUP) if entry.name == name]
        if entries:
            return Found(name, _read(entries, name))
    except Exception as error:
        return Found(name, None, error)
    raise BackendError(f"backend {name!r} is unknown; known: {', '.join((AUTO, *backend_names()))}")


def _read(entries: list[EntryPoint], name: str) -> BackendSpec:
    packages = sorted({entry.dist.name for entry in entries if entry.dist is not None})
    if len({entry.value for entry in entries}) > 1:
        raise BackendError(f"several packages offer it: {', '.join(packages)}; uninstall all but one")
    spec = entries[0].load()()
    if not isinstance(spec, BackendSpec):
        raise BackendError(f"{entries[0].value} returned {type(spec).__name__}, expected a BackendSpec")
    if spec.name != name:
        raise BackendError(f"{entries[0].value} calls itself {spec.name!r}, its entry point {name!r}")
    return spec


def open_backend(
    name: str = AUTO,
    *,
    notify: Notify | None = None,
    host_options: Mapping[str, object] | None = None,
    **options: object,
) -> Backend:
    """The backend called `name`, or an error with the reason and the exception behind it; "auto" takes the best that is
    ready. notify: gets one line for auto's choice. options: of the backend's own (its loader's keyword arguments), None
    where not given; RequestError for one that it does not have. host_options: the same for a backend of the processor;
    an accelerator's is opened without them, and whoever opens it sees to them."""
    given = {option: value for option, value in options.items() if value is not None}
    of_host = {option: value for option, value in (host_options or {}).items() if value is not None}
    if name == AUTO:
        return _open_best(notify, given, of_host)
    found = find(name)
    spec = found.checked_spec()
    probe = found.probe()
    if not probe.ready:
        raise BackendError(f"backend {name} is not ready: {probe.reason}") from probe.error
    return _load(spec, _options(spec, given, of_host))


def _open_best(notify: Notify | None, options: dict[str, object], of_host: dict[str, object]) -> Backend:
    """By priority; the first that is ready is loaded, those behind it are not even probed."""
    passed_over: list[str] = []
    found = [find(name) for name in backend_names()]
    for candidate in sorted(found, key=lambda item: -(item.spec.priority if item.spec else 0)):
        probe = candidate.probe()
        if probe.ready:
            why = "".join(f"; {line}" for line in passed_over)
            if notify is not None:
                notify(f"backend {candidate.name}, the best that is ready: {probe.reason}{why}")
            spec = candidate.checked_spec()
            return _load(spec, _options(spec, options, of_host))
        passed_over.append(f"{candidate.name} is not: {probe.reason}")
    raise BackendError(f"no backend is ready: {'; '.join(passed_over)}")


def _options(spec: BackendSpec, given: dict[str, object], of_host: dict[str, object]) -> dict[str, object]:
    return given if spec.accelerator else given | of_host


def _load(spec: BackendSpec, options: dict[str, object]) -> Backend:
    for option in options:
        if option not in inspect.signature(spec.load).parameters:
            raise RequestError(f"{option} has no effect with backend {spec.name!r}")
    try:
        backend = spec.load(**options)
    except K2LiteError:
        raise
    except Exception as error:
        raise BackendError(f"backend {spec.name} can't be loaded: {type(error).__name__}: {error}") from error
    demand_contract(spec.name, backend.contract)
    return backend


def demand_contract(name: str, contract: int) -> None:
    """Raise BackendError where a backend was written for another version of the seam."""
    if contract != CONTRACT:
        raise BackendError(
            f"backend {name} was written for contract {contract}, and this k2lite has contract {CONTRACT}: "
            f"install versions that belong together"
        )
