"""Names to backends. A backend's module is imported when it is asked for, so that listing them costs nothing."""

from __future__ import annotations

from k2lite.quant.errors import BackendError, RequestError

from .base import Backend

BACKEND_NAMES = ("cpu", "reference")
AUTO = "auto"


def open_backend(name: str = AUTO, *, activations: str | None = None, threads: int | None = None) -> Backend:
    """The backend called `name`; "auto" takes the best that is ready.

    activations ("int8" or "bf16") and threads are for the CPU backend; for another they are an error."""
    if name not in (AUTO, *BACKEND_NAMES):
        raise BackendError(f"backend {name!r} is unknown; known: {', '.join((AUTO, *BACKEND_NAMES))}")
    if name in (AUTO, "cpu"):
        from .cpu.backend import CpuBackend

        return CpuBackend(activations=activations or "int8", threads=threads)
    for option, value in (("activations", activations), ("threads", threads)):
        if value is not None:
            raise RequestError(f"{option} has no effect with backend {name!r}; it is for 'cpu'")
    from .reference import ReferenceBackend

    return ReferenceBackend()
