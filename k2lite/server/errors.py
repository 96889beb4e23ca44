"""What can go wrong with a request, before each API puts it into its own shape.

A message never holds a path or a part of the prompt.
"""

from __future__ import annotations

import traceback

from k2lite.quant.errors import K2LiteError


def frames_of(error: BaseException) -> str:
    """Where an error of nobody's intention came from, for the log: frames only, since a message may hold a prompt."""
    return "".join(traceback.format_tb(error.__traceback__))


class ApiError(K2LiteError):
    """A request that is not answered: HTTP status, message, and for OpenAI the parameter and a code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s: int | None = None


def invalid(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """A mistake in the request: 400."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, retry_after_s: int) -> ApiError:
    """Too much at once: 429 with Retry-After."""
    error = ApiError(429, message, code="rate_limit_exceeded")
    error.retry_after_s = retry_after_s
    return error


def broken() -> ApiError:
    """The engine failed; what happened stands in the server's log."""
    return ApiError(500, "the model failed while answering this request; the server's log says how", code="engine")
