"""Numba's compiler as the kernels of this folder use it: without the GIL, kept on the disk, and not silent.

A kernel is compiled the first time that it is called with new types, and kept by kernel_cache.py for the sources of its
own folder and of this one. Knows no kernel.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from .kernel_cache import kept_in, kernel_folder

PATIENCE_S = 1.0
_said = threading.Event()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, for calls from Python; other kernels call `inner` functions."""
    compiled = inner(function)
    ready = False

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal ready
        if ready:
            return compiled(*arguments)
        with _SlowCompilation():
            result = compiled(*arguments)
        ready = True
        return result

    return call


def inner(function: Callable[..., Any]) -> Any:
    """A compiled function that kernels may call."""
    sources = dict.fromkeys((Path(__file__).parent, Path(function.__code__.co_filename).parent))
    with kept_in(kernel_folder("loops", *sources)) as kept:
        try:
            return numba.njit(cache=kept, nogil=True, error_model="numpy")(function)
        except RuntimeError:  # Numba finds no file of the source: it lies in an archive
            return numba.njit(nogil=True, error_model="numpy")(function)


class _SlowCompilation:
    """Says once a process that compiling takes a while, if it does."""

    def __enter__(self) -> None:
        self._timer = threading.Timer(PATIENCE_S, _say)
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _say() -> None:
    if not _said.is_set():
        _said.set()
        print("k2lite: compiling kernels for this processor, which takes a while the first time", file=sys.stderr)
