"""Checksums of experts and trunk tensors: xxh3-64 of a piece's bytes, kept in k2lite_manifest.json.

A piece is an expert ("layer 3, expert 17") or a trunk weight (its stored name without ".weight"). Its bytes are those
of its matrices in order, each in its format's order of parts; weight_shape is no part of them, since every reader
compares it with the config. The quantizer writes the manifest; `k2lite verify --write` makes one for a folder as
downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash

from .errors import CheckpointError
from .file_reading import is_file, read_json_object, shown
from .types import ExpertKey, QuantTensor

MANIFEST_NAME = "k2lite_manifest.json"
MANIFEST_VERSION = 1
# What the manifest says of a piece that was copied as a range of bytes and not read.
UNVERIFIED = "unverified"
WEIGHT_SHAPE = "weight_shape"
_DIGITS = 16


def expert_piece(key: ExpertKey) -> str:
    """The name of an expert in the manifest."""
    return f"layer {key.layer}, expert {key.expert}"


def checksum(matrices: Iterable[QuantTensor]) -> str:
    """xxh3-64 of a piece's bytes, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    for matrix in matrices:
        for suffix in matrix.format.parts(matrix.shape):
            if suffix != WEIGHT_SHAPE:
                part = matrix.parts[suffix].contiguous().reshape(-1)
                digest.update(memoryview(part.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def demand_checksum(expected: str | None, matrices: Iterable[QuantTensor], where: str) -> None:
    """Raise CheckpointError, which begins with `where`, if the bytes are not those that were written."""
    if expected is None:
        return
    found = checksum(matrices)
    if found != expected:
        raise CheckpointError(
            f"{where}: the checksum is {found} and {MANIFEST_NAME} says {expected}; the file is damaged, copy it again"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's object, empty if there is none. Raises CheckpointError."""
    path = folder / MANIFEST_NAME
    if not is_file(path):
        return {}
    manifest = read_json_object(path)
    version, pieces = manifest.get("version"), manifest.get("pieces")
    if version != MANIFEST_VERSION or not isinstance(pieces, dict):
        raise CheckpointError(
            f"{path}: found version {shown(version)}, expected {MANIFEST_VERSION} with an object of pieces; "
            "remove the file, or make it anew with k2lite verify --write"
        )
    return manifest


def read_checksums(folder: Path) -> dict[str, str]:
    """Checksums by piece; those that are not known yet are left out. Raises CheckpointError."""
    table: dict[str, str] = {}
    for name, piece in read_manifest(folder).get("pieces", {}).items():
        value = piece.get("checksum") if isinstance(piece, dict) else None
        if value == UNVERIFIED:
            continue
        if not isinstance(value, str) or len(value) != _DIGITS:
            raise CheckpointError(
                f"{folder / MANIFEST_NAME}: {shown(name)} has the checksum {shown(value)}, expected {_DIGITS} "
                "hexadecimal digits; remove the file, or make it anew with k2lite verify --write"
            )
        table[name] = value
    return table
