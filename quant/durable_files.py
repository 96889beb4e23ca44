"""Files and folders that are put in place whole or not at all: a temporary name, fsync, rename, fsync of the folder.

Imports no torch. Knows nothing of what is in them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError, RequestError

PARTIAL = ".partial"


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that someone named, replacing what has its name. Raises RequestError where it can't be written,
    for want of room too; what was there before then stays, and nothing partial is left."""
    partial = path.with_name(f".{path.name}{PARTIAL}-{os.getpid()}")
    try:
        try:
            with partial.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.absolute().parent)
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from error


@contextmanager
def locked_partial(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `path`, its name and PARTIAL, that tells others that somebody writes `path`. The block gives it
    its name; without that it is gone afterwards. Raises RequestError where another process has it."""
    partial = path.with_name(path.name + PARTIAL)
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
        lock(file, partial)
        try:
            file.truncate(0)
            yield partial, file
        finally:
            partial.unlink(missing_ok=True)


def remove_unlocked(partials: Iterable[Path]) -> list[str]:
    """Take away what runs that were cut off have left; returns names and sizes. Raises RequestError where another run
    is writing them."""
    removed = []
    for left in partials:
        with left.open("rb") as file:
            lock(file, left)
            removed.append(f"{left.name}, {os.fstat(file.fileno()).st_size / 1e9:.1f} GB")
            left.unlink()
    return removed


def lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed, or the process ends however it ends. Raises RequestError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RequestError(f"{path}: another k2lite is writing it; wait for it or end it") from error


def demand_room(path: Path, nbytes: int) -> None:
    """Say before hours of work that a file of so many bytes will not fit. Raises RequestError."""
    try:
        free = shutil.disk_usage(path.absolute().parent).free
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from error
    if free < nbytes:
        raise RequestError(f"{path}: will have {nbytes} bytes and its disk has {free} free; name a file elsewhere")


def write_whole(path: Path, data: bytes) -> None:
    """A small file. Raises CheckpointError where it can't be written."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written: {error.strerror or error}; go on with --resume") from error


def write_new_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Have `fill` write into a folder beside `folder`, then put it in place. Raises RequestError for a name that
    exists, unless it is an empty folder, and for a place that can't be written; what `fill` raises leaves nothing."""
    try:
        # the last test: "." and ".." have no name beside which to write
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) or folder.name in ("", "..")):
            raise RequestError(f"{folder}: exists already; name a new folder")
        partial = folder.with_name(f".{folder.name}{PARTIAL}-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            fill(partial)
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
            sync(folder.absolute().parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RequestError(f"{folder}: can't be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
