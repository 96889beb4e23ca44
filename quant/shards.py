"""Which weight files a folder has and which tensors lie in them: the index file, every header, and what disagrees.

Never builds a shard's name by formula: names come from the index, or there is a single file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError
from .file_reading import is_file, is_name, read_json_object, shown
from .safetensors_file import TensorRecord, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shard:
    """A weight file and its size in bytes."""

    path: Path
    nbytes: int


@dataclass
class ShardSet:
    """All tensors of a folder by stored name, each with its file, and what is wrong with the files.

    `reported` are tensors whose absence `problems` already explains (their shard is missing, say); `notes` is what
    differs and does no harm."""

    shards: list[Shard] = field(default_factory=list)
    tensors: dict[str, tuple[Path, TensorRecord]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reported: set[str] = field(default_factory=set)


def read_shards(folder: Path) -> ShardSet:
    """Read the index and every header; a damaged or missing shard is a problem, an unusable index an error."""
    index = folder / INDEX_NAME
    found = ShardSet()
    if not is_file(index):
        single = _single_file(folder)
        _read_shard(found, single)
        found.notes += _left_aside(folder, {single}, f"{single.name} is taken, and there is no {INDEX_NAME}")
        return found
    content = read_json_object(index)
    weight_map = _weight_map(index, content)
    unreadable = set()
    for name, count in Counter(weight_map.values()).items():
        if not _read_shard(found, folder / name, f" ({count} tensors by the index)"):
            unreadable.add(name)
    found.reported.update(tensor for tensor, file in weight_map.items() if file in unreadable)
    found.problems += _disagreements(folder, weight_map, found)
    found.notes += _total_size(index, content, found, complete=not unreadable)
    named = {folder / name for name in set(weight_map.values())}
    found.notes += _left_aside(folder, named, f"{INDEX_NAME} does not name it")
    return found


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1 and folder / SINGLE_NAME not in files:
        what = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        raise CheckpointError(f"{folder}: found {what} and no {INDEX_NAME}; download the missing files again")
    return folder / SINGLE_NAME if len(files) != 1 else files[0]


def _weight_map(index: Path, content: dict[str, Any]) -> dict[str, str]:
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: found no weight_map, expected an object of tensor names to file names")
    inside: set[object] = set()
    for tensor, file in weight_map.items():
        if not is_name(tensor):
            raise CheckpointError(f"{index}: found the tensor name {shown(tensor)}, expected printable characters")
        if not isinstance(file, str) or (file not in inside and not _stays_inside(file)):
            raise CheckpointError(f"{index}: tensor {tensor} lies in {shown(file)}, expected a file inside the folder")
        inside.add(file)
    return weight_map


def _stays_inside(file: str) -> bool:
    """A downloaded index must not make us open files elsewhere. Links are followed, since hub caches are links."""
    path = PurePosixPath(file)
    return is_name(file) and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _read_shard(found: ShardSet, path: Path, held: str = "") -> bool:
    """Add a shard's tensors; False if there is no telling what it holds."""
    if not is_file(path):
        found.problems.append(f"{path}: shard is missing{held}; download it again")
        return False
    found.shards.append(Shard(path, path.stat().st_size))
    try:
        records = read_header(path)
    except CheckpointError as error:
        found.problems.append(f"{error}{held}")
        return False
    for name, record in records.items():
        if name in found.tensors:
            found.problems.append(f"{path}: tensor {name} lies in {found.tensors[name][0].name} too, expected it once")
        else:
            found.tensors[name] = (path, record)
    return True


def _disagreements(folder: Path, weight_map: dict[str, str], found: ShardSet) -> Iterator[str]:
    paths = {file: folder / file for file in set(weight_map.values())}
    for tensor, file in weight_map.items():
        here = found.tensors.get(tensor)
        if here is not None and here[0] is not paths[file] and here[0] != paths[file]:
            yield f"{here[0]}: tensor {tensor} is misplaced: it lies here, the index says {file}"
        elif here is None and tensor not in found.reported:
            found.reported.add(tensor)
            yield f"{paths[file]}: tensor {tensor} is missing, the index says that it lies here"
    for tensor, (path, _) in found.tensors.items():
        if tensor not in weight_map:
            yield f"{path}: tensor {tensor} lies here and is not in the index"


def _left_aside(folder: Path, used: set[Path], reason: str) -> Iterator[str]:
    """Other readers take every file of a folder; this one does not, and says so."""
    for path in sorted(folder.glob("*.safetensors")):
        if path not in used:
            yield f"{path}: not read, since {reason}"


def _total_size(index: Path, content: dict[str, Any], found: ShardSet, *, complete: bool) -> Iterator[str]:
    """No loader relies on total_size and writers disagree on what it counts; headers have been checked against the
    files' own sizes, so a difference is worth a note and no more."""
    metadata = content.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = sum(record.nbytes for _, record in found.tensors.values())
    if complete and stated is not None and stated != held:
        yield f"{index}: total_size is {shown(stated)}, the tensors have {held} bytes"
