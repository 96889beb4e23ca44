"""A folder beside a checkpoint that holds its routed experts as one backend multiplies them: read into slots, and used.

One file a layer, every expert in a place of its own of whole pages, and packed.json: whose experts they are, for which
backend, and a checksum of each. Invariant: the folder has its name only when all of it is on the drive; until then it
is NAME.partial with a journal of what is there, and whoever goes on begins behind that. A copy of another model, or of
another layout, is refused by what differs. Knows no device.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from k2lite.backends.base import Backend
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.checksums import expert_piece
from k2lite.quant.durable_files import PARTIAL, sync, write_whole
from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.file_reading import read_json_object, shown
from k2lite.quant.journal import Journal
from k2lite.quant.types import PROJECTIONS, ExpertKey, ExpertLayout, ExpertWeights, Extent

from .direct_files import PAGE_BYTES
from .packed_source import expert_kind, expert_kinds
from .slots import Arena, slot_bytes_for
from .store import ExpertRead, ExpertStore

INDEX_NAME, JOURNAL_NAME = "packed.json", "packed.jsonl"
FORMAT_VERSION = 1
READ_SLOTS = 4
# Experts between two syncs of what was written.
SYNC_EVERY = 16

# Hears bytes done and what was done.
Report = Callable[[int, str], None]


class PackedCopy:
    """The experts of `checkpoint` in `folder` as `backend` packs them. Raises RequestError for a folder that is another
    model's or layout's, BackendError for a backend that has no bytes of its own or can't say how to view them."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, backend: Backend) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self._backend = backend
        kinds = expert_kinds(checkpoint)
        self._nbytes = {kind: backend.expert_slot(kind).nbytes for kind in kinds}
        if not any(backend.expert_slot(kind).repacked for kind in kinds):
            raise RequestError(
                f"a packed copy has no effect with backend {backend.name}, which multiplies experts as stored"
            )
        for kind, nbytes in self._nbytes.items():
            backend.packed_views(kind, torch.empty(nbytes, dtype=torch.uint8))
        self.slot_bytes = -(-max(self._nbytes.values()) // PAGE_BYTES) * PAGE_BYTES
        self.identity = _identity(checkpoint, backend, self.slot_bytes)
        self._checksums = self._opened()

    @property
    def is_whole(self) -> bool:
        return bool(self._checksums)

    @property
    def nbytes(self) -> int:
        """Of all experts on the drive."""
        return self.slot_bytes * len(list(self.checkpoint.expert_keys()))

    def expert(self, key: ExpertKey) -> ExpertLayout:
        """Where an expert lies, for a store. It has no parts: `views` says what its bytes are."""
        kind = expert_kind(self.checkpoint, key)
        extent = Extent(_file(self.folder, key.layer), key.expert * self.slot_bytes, self._nbytes[kind])
        formats, shapes = (dict(zip(PROJECTIONS, column, strict=True)) for column in zip(*kind, strict=True))
        return ExpertLayout(key, (extent,), {}, formats, shapes, self._checksums[expert_piece(key)])

    def views(self, layout: ExpertLayout, memory: torch.Tensor) -> ExpertWeights:
        """The weights in `memory`, uint8, that an expert was read into. Raises CheckpointError for wrong bytes."""
        kind = expert_kind(self.checkpoint, layout.key)
        held = memory[: self._nbytes[kind]]
        found = _digest(held)
        if found != layout.checksum:
            raise CheckpointError(
                f"{layout.extents[0].file}: {expert_piece(layout.key)}: the checksum is {found} and {INDEX_NAME} says "
                f"{layout.checksum}; remove {self.folder} and have it written again"
            )
        return self._backend.packed_views(kind, held)

    def write(self, report: Report = lambda _done, _what: None) -> None:
        """Make the folder, going on where an earlier run was cut off. Raises RequestError, CheckpointError."""
        partial = self.folder.absolute().with_name(self.folder.absolute().name + PARTIAL)
        journal = Journal(partial, JOURNAL_NAME)
        try:
            begun, lines = journal.read()
            if begun is None:
                journal.begin(self.identity)
            else:
                _demand_same(begun, self.identity, partial)
            checksums = {expert_piece(ExpertKey(*line["expert"])): str(line["checksum"]) for line in lines}
            self._demand_room(partial, len(checksums))
            try:
                self._write_missing(partial, journal, checksums, report)
                index = {**self.identity, "checksums": checksums}
                write_whole(partial / INDEX_NAME, json.dumps(index).encode())
                journal.remove()
                partial.rename(self.folder)
                sync(partial.parent)
            except OSError as error:
                raise RequestError(
                    f"{partial}: can't be written: {error.strerror or error}; the next run goes on from here"
                ) from error
        finally:
            journal.close()
        self._checksums = self._opened()

    def _opened(self) -> Mapping[str, str]:
        """The checksums of a whole copy; none if there is no folder yet."""
        if not self.folder.exists():
            return {}
        index = read_json_object(self.folder / INDEX_NAME, RequestError)
        _demand_same(index, self.identity, self.folder)
        checksums = index.get("checksums")
        pieces = {expert_piece(key) for key in self.checkpoint.expert_keys()}
        if not isinstance(checksums, dict) or set(checksums) != pieces:
            raise RequestError(f"{self.folder / INDEX_NAME}: has no checksum of each expert; remove {self.folder}")
        wanted = self.checkpoint.schema.n_routed_experts * self.slot_bytes
        for layer in self.checkpoint.schema.expert_layers:
            file = _file(self.folder, layer)
            found = file.stat().st_size if file.is_file() else None
            if found != wanted:
                has = "is not there" if found is None else f"has {found} bytes, expected {wanted}"
                raise RequestError(f"{file}: {has}; remove {self.folder} and have it written again")
        return checksums

    def _write_missing(self, partial: Path, journal: Journal, checksums: dict[str, str], report: Report) -> None:
        keys = [key for key in self.checkpoint.expert_keys() if expert_piece(key) not in checksums]
        written: list[tuple[ExpertKey, str]] = []
        store = ExpertStore(self.checkpoint)
        slots = {kind: self._backend.alloc(nbytes).zero_() for kind, nbytes in self._nbytes.items()}
        try:
            for read in reads_in_turn(store, keys):
                slot = slots[expert_kind(self.checkpoint, read.key)]
                assert read.weights is not None
                self._backend.pack_expert(read.weights, slot)
                there = self._backend.download(slot)
                self._write_expert(partial, read.key, there)
                written.append((read.key, _digest(there)))
                if len(written) >= SYNC_EVERY:
                    _commit(partial, journal, checksums, written)
                report(len(checksums) * self.slot_bytes, f"{self.folder.name}: {expert_piece(read.key)}")
            _commit(partial, journal, checksums, written)
        finally:
            store.close()

    def _write_expert(self, partial: Path, key: ExpertKey, data: torch.Tensor) -> None:
        size = self.checkpoint.schema.n_routed_experts * self.slot_bytes
        fd = os.open(_file(partial, key.layer), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, size)
            view, at = memoryview(data.numpy()), key.expert * self.slot_bytes  # type: ignore[arg-type]
            while len(view):
                count = os.pwrite(fd, view, at)
                view, at = view[count:], at + count
        finally:
            os.close(fd)

    def _demand_room(self, partial: Path, done: int) -> None:
        needed, free = self.nbytes - done * self.slot_bytes, shutil.disk_usage(partial).free
        if free < needed:
            raise RequestError(f"{partial}: {needed} bytes are to be written and its disk has {free} free")


def reads_in_turn(store: ExpertStore, keys: list[ExpertKey]) -> Iterator[ExpertRead]:
    """Experts in about this order, a few being read at a time; an expert's views are valid until the next is asked for.
    Raises CheckpointError where one can't be read."""
    arena = Arena(READ_SLOTS, slot_bytes_for(store.checkpoint))
    done: queue.SimpleQueue[ExpertRead] = queue.SimpleQueue()
    free, todo, under_way = list(range(READ_SLOTS)), keys[::-1], 0
    while todo or under_way:
        while free and todo:
            store.start(todo.pop(), arena, free.pop(), done.put)
            under_way += 1
        read = done.get()
        under_way -= 1
        if read.weights is None:
            while under_way:
                done.get()
                under_way -= 1
            raise read.error or RuntimeError(f"{read.key} was not read")
        yield read
        free.append(read.slot)


def _commit(partial: Path, journal: Journal, checksums: dict[str, str], written: list[tuple[ExpertKey, str]]) -> None:
    """Have what was written on the drive, then say so."""
    for layer in {key.layer for key, _ in written}:
        sync(_file(partial, layer))
    for key, found in written:
        journal.add({"expert": list(key), "checksum": found})
        checksums[expert_piece(key)] = found
    journal.commit()
    written.clear()


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.bin"


def _digest(data: torch.Tensor) -> str:
    return str(xxhash.xxh3_64_hexdigest(memoryview(data.numpy())))  # type: ignore[arg-type]


def _identity(checkpoint: Checkpoint, backend: Backend, slot_bytes: int) -> dict[str, Any]:
    """What must be the same for the bytes to be these experts' in this layout."""
    known = [checkpoint.checksums.get(expert_piece(key), "") for key in checkpoint.expert_keys()]
    experts = "".join(known).encode()
    return {
        "version": FORMAT_VERSION,
        "backend": backend.name,
        "contract": backend.contract,
        "layout": backend.layout_version,
        "slot_bytes": slot_bytes,
        "model": checkpoint.fingerprint(),
        "files": {shard.path.name: shard.nbytes for shard in checkpoint.shards},
        "checksums_of_the_model": xxhash.xxh3_64_hexdigest(experts) if all(known) else None,
    }


def _demand_same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Raise RequestError naming what differs."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RequestError(
                f"{where}: holds experts of another {_WORDS[name]}: {shown(found.get(name))}, expected {shown(value)}; "
                "name another folder for --packed-copy, or remove this one"
            )


_WORDS = {
    "version": "version of packed copies",
    "backend": "backend",
    "contract": "backend contract",
    "layout": "layout version",
    "slot_bytes": "size",
    "model": "model",
    "files": "model (its files)",
    "checksums_of_the_model": "model (its checksums)",
}
