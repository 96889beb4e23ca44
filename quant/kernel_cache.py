"""Where compiled kernels lie between two runs, for all that Numba compiles.

Numba compares a kernel's own file with what it has kept and not the files whose functions were inlined, so a change
there would leave old machine code in use. Invariant: whatever is kept in a folder of here was made from exactly the
sources named, by this Numba, for this processor, because all of them name the folder. Knows no kernel.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import config as _config

from .user_folders import user_cache_folder

config: Any = _config  # its attributes come from the environment
GIVEN: str = config.CACHE_DIR  # by the user; inside `kept_in` it is something else


@cache
def kernel_folder(name: str, *source_folders: Path) -> Path | None:
    """A folder under NUMBA_CACHE_DIR if that is set, else under the user's cache, for kernels made from the Python
    files of `source_folders`. None, with a line on stderr, where nothing can be written: work goes on without."""
    base = Path(GIVEN) if GIVEN else user_cache_folder()
    folder = base / f"{name}-{_fingerprint(source_folders)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(f"k2lite: {folder}: {error.strerror}; compiled kernels ({name}) are not kept", file=sys.stderr)
        return None
    return folder


@contextmanager
def kept_in(folder: Path | None) -> Iterator[bool]:
    """What is decorated inside is kept there, if there is a folder: whether it is. Numba looks up its cache's place
    while it decorates; outside, the user's setting stays untouched."""
    before = config.CACHE_DIR
    config.CACHE_DIR = "" if folder is None else str(folder)
    try:
        yield folder is not None
    finally:
        config.CACHE_DIR = before


def _fingerprint(source_folders: tuple[Path, ...]) -> str:
    """Of all that decides the machine code: our sources, the compiler, the processor."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    digest.update(f"{config.CPU_NAME or llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}".encode())
    for folder in source_folders:
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
