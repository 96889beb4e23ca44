"""Kernels, compiled once a machine and kept on disk.

A kernel is a C function of integers, called by address. Invariant: a file in the cache was made from exactly these
sources, by this Numba, for this path and processor, because all of them name its folder. A folder that can't be
written is done without, with a line on stderr. Knows no kernel's purpose.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import config as _config

from k2lite.quant.user_folders import user_cache_folder

from . import isa

config: Any = _config  # its attributes come from the environment
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
            with _cache_in(cache_folder()) as cached:
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
    with _cache_in(cache_folder()) as cached:
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


@cache
def cache_folder() -> Path | None:
    """Where compiled kernels lie: under NUMBA_CACHE_DIR if it is set, else under the user's cache. None where nothing
    can be written."""
    base = Path(config.CACHE_DIR) if config.CACHE_DIR else user_cache_folder()
    folder = base / f"kernels-{isa.selected()}-{_fingerprint()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(
            f"k2lite: {folder}: {error.strerror}; compiling CPU kernels ({isa.selected()}), not kept", file=sys.stderr
        )
        return None
    return folder


def _fingerprint() -> str:
    """Of all that decides the machine code: our sources, the compiler, the processor."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    digest.update(f"{config.CPU_NAME or llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _cache_in(folder: Path | None) -> Iterator[bool]:
    """Numba looks up its cache's place while it decorates; outside, the user's setting stays untouched."""
    before = config.CACHE_DIR
    config.CACHE_DIR = "" if folder is None else str(folder)
    try:
        yield folder is not None
    finally:
        config.CACHE_DIR = before
