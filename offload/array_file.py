"""Named arrays and the facts that go with them in one safetensors file: routing traces and saved statistics.

Invariant: a file is put in place whole or not at all, and says in its header of what kind it is and of which version.
Knows no routing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from k2lite.quant.durable_files import replace_file
from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.file_reading import parse_json_object
from k2lite.quant.safetensors_file import read_header

VERSION = "1"
Arrays = dict[str, npt.NDArray[np.generic]]


def write_arrays(
    path: Path, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[np.generic]]
) -> None:
    """Raises RequestError where it can't be written; what was there before then stays."""
    header = {"kind": kind, "version": VERSION, "facts": json.dumps(facts)}
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    replace_file(path, [save(whole, metadata=header)])


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], Arrays]:
    """The facts and the arrays. Raises RequestError where it is missing, damaged or of another kind or version."""
    if not path.is_file():
        raise RequestError(f"{path}: no such file; expected a {kind} file of k2lite")
    try:
        read_header(path)  # believes nothing; what follows may
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get("kind") != kind:
                raise RequestError(f"{path}: is a file of kind {header.get('kind')!r}, expected {kind!r}")
            if header.get("version") != VERSION:
                raise RequestError(f"{path}: is of version {header.get('version')!r}, expected {VERSION!r}")
            facts = parse_json_object(header.get("facts", "").encode(), f"{path}: facts", RequestError)
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except CheckpointError as error:
        raise RequestError(str(error).removesuffix("; download the file again")) from error
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: can't be read: {error}") from error
