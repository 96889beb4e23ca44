"""Which weight files a folder has and which tensors lie in them: the index file, every header, and what disagrees.

Never builds a shard's name by formula: names come from the index, or there is a single file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .errors import CheckpointError
from .safetensors_file import TensorRecord, read_header

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """A weight file and its size in bytes."""

    path: Path
    nbytes: int


@dataclass
class ShardSet:
    """All tensors of a folder by stored name, each with its file, and what is wrong with the files."""

    shards: list[Shard] = field(default_factory=list)
    tensors: dict[str, tuple[Path, TensorRecord]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_shards(folder: Path) -> ShardSet:
    """Read the index and every header; a damaged or missing shard is a problem, an unusable index an error."""
    index = folder / INDEX_NAME
    found = ShardSet()
    if not index.is_file():
        _read_shard(found, _single_file(folder))
        return found
    weight_map = _weight_map(index)
    for name in dict.fromkeys(weight_map.values()):
        _read_shard(found, folder / name)
    found.problems += _disagreements(folder, weight_map, found)
    return found


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        what = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        raise CheckpointError(f"{folder}: found {what} and no {INDEX_NAME}; download the missing files again")
    return files[0]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: can't be read as JSON: {error!s:.100}; download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: found no weight_map, expected tensor names to file names")
    for tensor, file in weight_map.items():
        # a downloaded index must not make us open files elsewhere
        if not isinstance(file, str) or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(
                f"{index}: tensor {tensor!r:.200} lies in {file!r:.200}, expected a file inside the folder"
            )
    return weight_map


def _read_shard(found: ShardSet, path: Path) -> None:
    if not path.is_file():
        found.problems.append(f"{path}: shard is missing; download it again")
        return
    found.shards.append(Shard(path, path.stat().st_size))
    try:
        records = read_header(path)
    except CheckpointError as error:
        found.problems.append(str(error))
        return
    for name, record in records.items():
        if name in found.tensors:
            found.problems.append(f"{path}: tensor {name} lies in {found.tensors[name][0].name} too")
        else:
            found.tensors[name] = (path, record)


def _disagreements(folder: Path, weight_map: dict[str, str], found: ShardSet) -> Iterator[str]:
    readable = {path for path, _ in found.tensors.values()}
    for tensor, file in weight_map.items():
        here = found.tensors.get(tensor)
        if here is None and folder / file in readable:
            yield f"{folder / file}: tensor {tensor} is missing, the index says that it lies here"
        elif here is not None and here[0] != folder / file:
            yield f"{here[0]}: tensor {tensor} lies here, the index says {file}"
    for tensor, (path, _) in found.tensors.items():
        if tensor not in weight_map:
            yield f"{path}: tensor {tensor} lies here and is not in the index"
