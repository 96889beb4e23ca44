"""Names to backends. A backend's module is imported when it is asked for, so that listing them costs nothing."""

from __future__ import annotations

from k2lite.quant.errors import BackendError

from .base import Backend

BACKEND_NAMES = ("reference",)
AUTO = "auto"


def open_backend(name: str = AUTO) -> Backend:
    """The backend called `name`; "auto" takes the best that is ready."""
    if name not in (AUTO, *BACKEND_NAMES):
        raise BackendError(f"backend {name!r} is unknown; known: {', '.join((AUTO, *BACKEND_NAMES))}")
    from .reference import ReferenceBackend

    return ReferenceBackend()
