"""Kernels, compiled once a machine and kept on disk.

A kernel is a C function of integers, called by address. It is kept by quant/kernel_cache.py, in a folder for this
path. Knows no kernel's purpose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from k2lite.quant.kernel_cache import kept_in, kernel_folder

from . import isa

COMPLETE = "complete"  # the file that says: all kernels are there
_registered: list[Kernel] = []


class Kernel:
    """A function that compiles when its address is first asked for. `compiled` has inspect_asm and cache_hits."""

    def __init__(self, function: Callable[..., None], arguments: int) -> None:
        self.function = function
        self.__name__ = function.__name__
        self._signature = f"void({', '.join(['int64'] * arguments)})"
        self._compiled: Any = None
        self._address = 0
        _registered.append(self)

    @property
    def compiled(self) -> Any:
        if self._compiled is None:
            isa.selected()
            with kept_in(cache_folder()) as cached:
                make = numba.cfunc(self._signature, cache=cached, error_model="numpy")
                self._compiled = make(self.function)
        return self._compiled

    @property
    def address(self) -> int:
        if not self._address:
            self._address = int(self.compiled.address)
        return self._address


def kernel(arguments: int) -> Callable[[Callable[..., None]], Kernel]:
    """Make a kernel of a function that takes so many integers and returns nothing."""
    return lambda function: Kernel(function, arguments)


def python_callable(signature: str, function: Callable[..., Any]) -> Any:
    """The same for a function that Python calls; it runs without the interpreter's lock."""
    isa.selected()
    with kept_in(cache_folder()) as cached:
        return numba.njit(signature, cache=cached, nogil=True, error_model="numpy")(function)


def compile_all() -> None:
    """Compile or load every kernel that has been registered; says so on stderr where it will take a while."""
    folder = cache_folder()
    if folder is not None and not (folder / COMPLETE).exists():
        print(f"k2lite: compiling CPU kernels ({isa.selected()}), once on this machine", file=sys.stderr)
    for item in _registered:
        item.compiled  # noqa: B018 (compiles)
    if folder is not None:
        try:
            (folder / COMPLETE).touch()
        except OSError as error:
            print(f"k2lite: {folder}: {error.strerror}; kernels will be compiled again", file=sys.stderr)


def cache_folder() -> Path | None:
    """Where compiled kernels lie; None where nothing can be written."""
    return kernel_folder(f"kernels-{isa.selected()}", Path(__file__).parent)
