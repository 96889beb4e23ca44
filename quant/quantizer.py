"""Writes a quantized folder in one pass over the source, and goes on where a run was cut off.

Invariant: whatever happens in between, what lies under a final name is whole and synced, and a run that was cut off
and resumed ends with the bytes of one that was not. Memory does not grow with the number of layers. Order: bytes,
fsync, journal, fsync, rename; then the small files, the index and config.json last, so that an unfinished folder is no
model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
import xxhash

from .checksums import MANIFEST_NAME, MANIFEST_VERSION, UNVERIFIED
from .conversion import Block, ConvertedBlock, Damage, blank_block, block_reads, convert_block, converted
from .direct_reading import read_direct
from .durable_files import PARTIAL, write_whole
from .errors import CheckpointError, RequestError
from .heap import keep_freed_memory
from .journal import JOURNAL_NAME, Journal, demand_same
from .method import HessianSource, Method
from .moments import Moments
from .quantization_plan import OutputShard, Piece, QuantizationPlan
from .read_ahead import read_ahead
from .safetensors_file import TensorRecord
from .shard_writer import ShardWriter, file_bytes
from .shards import INDEX_NAME

CONFIG_NAME = "config.json"
# Bytes between two syncs, during which nothing is written: a few seconds of work, which a killed run does again.
SYNC_BYTES = 1 << 30
COPY_BYTES = 16 << 20
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# That wait for the drive while others compute.
READERS = 2
# Blocks of 16 MiB that are read or worked on before they are written: enough for every thread to have one.
READ_AHEAD_BLOCKS = max(8, THREADS + READERS)


@dataclass
class Progress:
    """Where a run is. Bytes are of this run, without what was there already."""

    piece: str = ""
    read_bytes: int = 0
    written_bytes: int = 0
    done_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """`source` is what the source was when the plan was made, by file: a resumed run must find the same. `config` is
    the new folder's config.json. `source_folder`'s other files are carried along. `importance` and `hessians` are what
    is known of the matrices' inputs."""

    plan: QuantizationPlan
    source_folder: Path
    source: Mapping[str, str]
    config: Mapping[str, Any]
    destination: Path
    importance: Moments | None = None
    hessians: HessianSource | None = None

    @cached_property
    def method(self) -> Method:
        return Method(self.plan.recipe.scale_search, self.importance, self.hessians)

    @property
    def identity(self) -> dict[str, Any]:
        return {"settings": {**self.plan.settings, **self.method.settings}, "source": dict(self.source)}


@dataclass
class _Run:
    job: Job
    journal: Journal
    lines: list[dict[str, Any]]
    report: Callable[[Progress], None]
    # threads for the whole run: the C library gives each new one a heap of its own
    workers: ThreadPoolExecutor
    progress: Progress = field(default_factory=Progress)


def source_identity(files: Mapping[str, Path]) -> dict[str, str]:
    """Size and time of change of each file: what tells that a source is the one that a run was begun with."""
    return {name: f"{path.stat().st_size} bytes, changed {path.stat().st_mtime_ns} ns" for name, path in files.items()}


def quantize(job: Job, *, resume: bool, report: Callable[[Progress], None]) -> Progress:
    """Do the whole job. With `resume`, go on behind what an earlier run of the same job has put on the disk; on an
    absent folder it simply begins. Raises RequestError if the folder is in use, holds something else, or was begun
    with other settings; CheckpointError where bytes can't be read or written."""
    job.method.demand_known(job.plan.matrices)
    demand_usable(job.destination, resume)
    keep_freed_memory()
    journal = Journal(job.destination)
    workers = ThreadPoolExecutor(THREADS + READERS, thread_name_prefix="convert")
    try:
        first, lines = journal.read()
        if first is None:
            _demand_space(job)
            journal.begin(job.identity)
        else:
            demand_same(first, job.identity, job.destination)
        _load_kernels(job, workers)
        run = _Run(job, journal, lines, report, workers)
        for number, shard in enumerate(job.plan.shards):
            _write_shard(run, number, shard)
        _write_small_files(run)
        journal.remove()
        return run.progress
    finally:
        workers.shutdown(cancel_futures=True)
        journal.close()


def demand_usable(destination: Path, resume: bool) -> None:
    """Raise RequestError for a folder that a run can't begin in, or go on in."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise RequestError(f"{destination}: exists and is no folder; name a new one")
    if (destination / MANIFEST_NAME).exists() and not (destination / JOURNAL_NAME).exists():
        raise RequestError(f"{destination}: is finished already; remove it to make it anew")
    if not resume and any(destination.iterdir()):
        begun = (destination / JOURNAL_NAME).exists()
        what = (
            "holds an unfinished run; go on with --resume or remove it" if begun else "is not empty; name a new folder"
        )
        raise RequestError(f"{destination}: {what}")


def _demand_space(job: Job) -> None:
    needed = job.plan.total_bytes
    free = shutil.disk_usage(job.destination).free
    if needed > free:
        raise CheckpointError(
            f"{job.destination}: the new folder takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "make room or name a folder on another disk"
        )


def _load_kernels(job: Job, workers: ThreadPoolExecutor) -> None:
    """Have a thread do what takes half a second while the first bytes are read, which are often kept as they are. What
    fails here fails in the first real block too, and is told there."""
    first = next((matrix for matrix in job.plan.matrices if not matrix.is_kept), None)
    if first is not None and job.hessians is None:  # which would have it make a factor for nothing
        workers.submit(convert_block, blank_block(first, job.method))


def _write_shard(run: _Run, number: int, shard: OutputShard) -> None:
    path = run.job.destination / shard.file
    lines = [line for line in run.lines if line["shard"] == number]
    if path.exists():
        if len(lines) != len(shard.pieces) or path.stat().st_size != file_bytes(shard.tensors):
            raise CheckpointError(f"{path}: is not what the run has written there; remove the folder and begin anew")
        run.progress.done_bytes += sum(piece.source_nbytes for piece in shard.pieces)
        return
    writer, done = _reopen(run, shard, path, lines)
    try:
        run.progress.done_bytes += sum(piece.source_nbytes for piece in shard.pieces[:done])
        pieces = shard.pieces[done:]
        blocks = read_ahead(_reads(pieces, run.job.method), _convert, READ_AHEAD_BLOCKS, run.workers)
        unsynced = 0
        for piece in pieces:
            run.progress.piece = piece.name
            line = _write_piece(run, writer, piece, blocks)
            run.journal.add({"shard": number, "piece": piece.name, **line})
            run.progress.done_bytes += piece.source_nbytes
            run.report(run.progress)
            unsynced += piece.nbytes
            if unsynced >= SYNC_BYTES:
                writer.sync()
                run.journal.commit()
                unsynced = 0
        for matrix, spec in shard.shapes:
            writer.append([torch.tensor(matrix.source.shape, dtype=spec.dtype)])
        writer.sync()
        run.journal.commit()
        writer.finish()
    finally:
        writer.close()


def _reopen(run: _Run, shard: OutputShard, path: Path, lines: list[dict[str, Any]]) -> tuple[ShardWriter, int]:
    """A writer behind the pieces that are whole, and their number. What the journal says is checked, byte by byte."""
    if not lines or not path.with_name(path.name + PARTIAL).exists():
        run.journal.forget(len(lines))
        return ShardWriter(path, shard.tensors), 0
    written = sum(piece.nbytes for piece in shard.pieces[: len(lines)])
    writer = ShardWriter(path, shard.tensors, written=written)
    at = 0
    for place, (line, piece) in enumerate(zip(lines, shard.pieces, strict=False)):
        if line["checksum"] != UNVERIFIED and line["checksum"] != _checksum_of(writer, at, piece.nbytes):
            writer.close()
            run.journal.forget(len(lines) - place)
            return ShardWriter(path, shard.tensors, written=at), place
        at += piece.nbytes
    return writer, len(lines)


def _checksum_of(writer: ShardWriter, offset: int, nbytes: int) -> str:
    digest = xxhash.xxh3_64()
    for at in range(offset, offset + nbytes, COPY_BYTES):
        digest.update(writer.read_back(at, min(COPY_BYTES, offset + nbytes - at)))
    return digest.hexdigest()


def _reads(pieces: Iterable[Piece], method: Method) -> Iterator[Callable[[], Block | torch.Tensor]]:
    """What reads these pieces, in order: blocks to be converted and bytes that stay as they are."""
    for piece in pieces:
        if piece.carried is not None:
            yield from _carried_reads(*piece.carried)
        for matrix in piece.matrices:
            if not matrix.is_kept:
                yield from block_reads(matrix, method)
            elif not matrix.is_copied:
                for path, record in matrix.kept_run:
                    yield from _carried_reads(path, record)


def _carried_reads(path: Path, record: TensorRecord) -> Iterator[Callable[[], torch.Tensor]]:
    for at in range(0, record.nbytes, COPY_BYTES):
        nbytes = min(COPY_BYTES, record.nbytes - at)
        yield partial(read_direct, path, record.offset + at, nbytes, f"tensor {record.name}")


def _convert(read: Callable[[], Block | torch.Tensor]) -> ConvertedBlock | torch.Tensor:
    found = read()
    return convert_block(found) if isinstance(found, Block) else found


def _write_piece(
    run: _Run, writer: ShardWriter, piece: Piece, blocks: Iterator[ConvertedBlock | torch.Tensor]
) -> dict[str, Any]:
    """Append a piece; returns what the journal and the manifest say of it."""
    digest = xxhash.xxh3_64()
    verified = True
    weights: dict[str, dict[str, Any]] = {}

    def append(tensor: torch.Tensor) -> None:
        digest.update(memoryview(tensor.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]
        writer.append([tensor])
        run.progress.written_bytes += tensor.nbytes

    def carry(record: TensorRecord) -> None:
        for _ in range(0, record.nbytes, COPY_BYTES):
            append(cast(torch.Tensor, next(blocks)))

    if piece.carried is not None:
        carry(piece.carried[1])
    for matrix in piece.matrices:
        entry: dict[str, Any] = {"format": matrix.target.name, "source": matrix.source_format.name}
        if not matrix.is_kept:
            damage = Damage()
            for tensor in converted(matrix, cast(Iterator[ConvertedBlock], blocks), damage):
                append(tensor)
            entry |= {"relative_mse": _rounded(damage.relative_mse), "cosine": _rounded(damage.cosine)}
        elif matrix.is_copied:
            verified = False
            for path, record in matrix.kept_run:
                writer.copy(path, record.offset, record.nbytes)
                run.progress.written_bytes += record.nbytes
        else:
            for _, record in matrix.kept_run:
                carry(record)
        weights[matrix.module] = entry
    run.progress.read_bytes += piece.source_nbytes
    return {"checksum": digest.hexdigest() if verified else UNVERIFIED, "weights": weights}


def _rounded(value: float) -> float:
    """Six digits: more would depend on the order of a sum."""
    return float(f"{value:.6g}")


def _write_small_files(run: _Run) -> None:
    job = run.job
    for path in sorted(job.source_folder.iterdir()):
        written_anew = path.suffix == ".safetensors" or path.name in (INDEX_NAME, CONFIG_NAME, MANIFEST_NAME)
        if path.is_file() and not written_anew and not path.name.startswith("."):
            write_whole(job.destination / path.name, path.read_bytes())
    weight_map = {spec.name: shard.file for shard in job.plan.shards for spec in shard.tensors}
    total = sum(spec.nbytes for shard in job.plan.shards for spec in shard.tensors)
    write_whole(
        job.destination / MANIFEST_NAME,
        _json({"version": MANIFEST_VERSION, **job.identity, "pieces": _manifest_pieces(run.journal)}),
    )
    write_whole(job.destination / INDEX_NAME, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    write_whole(job.destination / CONFIG_NAME, _json(job.config))


def _manifest_pieces(journal: Journal) -> dict[str, Any]:
    _, lines = journal.read()
    return {line["piece"]: {"checksum": line["checksum"], "weights": line["weights"]} for line in lines}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
