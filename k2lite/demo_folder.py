"""The demo checkpoint that comes with the package, and new folders that are written whole or not at all.

The checkpoint is a small Kimi-K2 that was really trained (docs/demo-model.md). Imports no torch: `--help` names it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from k2lite.quant.errors import RequestError

DEMO_FOLDER = Path(__file__).resolve().parent / "demo"


def copy_demo(folder: Path) -> None:
    """The demo checkpoint in a folder of its own."""
    write_new_folder(folder, lambda partial: shutil.copytree(DEMO_FOLDER, partial, dirs_exist_ok=True))


def write_new_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Have `fill` write into a folder beside `folder`, then put it in place. Raises RequestError for a name that
    exists, unless it is an empty folder, and for a place that can't be written."""
    try:
        # the last test: "." and ".." have no name beside which to write
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.name in ("", "..")):
            raise RequestError(f"{folder}: exists already; name a new folder")
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            fill(partial)
            _sync(partial)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RequestError(f"{folder}: can't be written: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
