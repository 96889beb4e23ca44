"""Reading what others wrote: a run of bytes whole, JSON that is what it seems, and words about both that are short.

Invariant: whatever the bytes are, the only exception is CheckpointError (or the K2LiteError that the caller names),
and its text is bounded and printable.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, K2LiteError

MAX_JSON_BYTES = 100_000_000  # the safetensors package's own limit for a header
MAX_NAME_LENGTH = 1000

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 200, 100, 60


def shown(value: object) -> str:
    """A value from a file as text of an error message: its repr, cut in length and depth."""
    return _SHORT.repr(value)


def is_name(value: object) -> bool:
    """Whether a tensor or file name can be printed as it is: no control characters, no halves of surrogate pairs."""
    return isinstance(value, str) and len(value) <= MAX_NAME_LENGTH and value.isprintable()


def is_file(path: Path) -> bool:
    """Whether a regular file lies there, behind links too. What can't even be looked up (a name that is too long, a
    loop of links) is none."""
    return os.path.isfile(path)


def read_exactly(path: Path, offset: int, buffer: torch.Tensor, what: str) -> None:
    """Fill `buffer`, uint8 [n] on the CPU, from `path` at `offset`."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    break
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: {what} can't be read: {error.strerror or error}") from error
    if done < len(view):
        raise CheckpointError(
            f"{path}: {what}: found {done} of {len(view)} bytes at offset {offset}; the file has become shorter, "
            "download it again"
        )


def read_json_object(path: Path, error: type[K2LiteError] = CheckpointError) -> dict[str, Any]:
    """The JSON object that a whole file is. Raises `error`, which begins with the path."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as failure:
        raise error(f"{path}: can't be read: {failure.strerror or failure}") from failure
    if len(text) > MAX_JSON_BYTES:
        raise error(f"{path}: found more than {MAX_JSON_BYTES} bytes, expected fewer; download the file again")
    return parse_json_object(text, str(path), error)


def parse_json_object(text: bytes, where: str, error: type[K2LiteError] = CheckpointError) -> dict[str, Any]:
    """JSON from a file. Names may not occur twice in an object: readers differ in which one they take.
    Raises `error`, which begins with `where`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise error(
                f"{where}: found the name {shown(twice)} twice, expected each name once; download the file again"
            )
        return table

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except RecursionError as failure:
        raise error(
            f"{where}: found JSON nested too deeply, expected a flat object; download the file again"
        ) from failure
    except ValueError as failure:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise error(
            f"{where}: found something that is not JSON ({failure!s:.100}), expected a JSON object; "
            "download the file again"
        ) from failure
    if not isinstance(value, dict):
        raise error(f"{where}: found a JSON {type(value).__name__}, expected an object; download the file again")
    return value
