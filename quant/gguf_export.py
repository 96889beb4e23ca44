"""Writes a checkpoint as one GGUF file for llama.cpp, a block of rows at a time.

Types follow llama.cpp's own converter: norms, router and biases are F32. With q4_0 the routed experts are Q4_0 and all
other matrices Q8_0, as in the "Q4_X" files of Kimi-K2-Thinking. INT4 and INT8 codes are copied; FP8 and floating-point
weights are dequantized and quantized. No more is in memory than a few blocks of rows, or one layer's kv_b_proj.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, StoredModule
from .conversion import read_rows, row_spans
from .decoding import decoded
from .errors import CheckpointError, RequestError
from .ggml_blocks import BLOCKS, GROUP, WRITTEN, ScaleCount, format_of_type, packed_as_blocks
from .ggml_types import BY_NAME, GgmlType
from .gguf_names import Heads, gguf_name, split_names, stack_name
from .gguf_split import Part, SplitWriter, demand_places, part_bytes, parts_of
from .gguf_writer import GgufTensorSpec
from .plain import PLAIN_DTYPES
from .quantizer import READERS, THREADS
from .read_ahead import read_ahead
from .types import PROJECTIONS, ExpertKey, QuantTensor

EXPORT_TYPES = ("q4_0", "q8_0", "bf16", "f16", "f32")
READ_AHEAD_BLOCKS = 3
BLOCK_WEIGHTS = 2 << 20


@dataclass(frozen=True)
class Stack:
    """One tensor of the file and the weights that follow one another in it. `half` says which part of kv_b_proj it is:
    "" for none, "k" or "v"."""

    spec: GgufTensorSpec
    kind: str
    sources: tuple[StoredModule, ...]
    half: str = ""

    @property
    def source_nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)


@dataclass(frozen=True)
class ExportPlan:
    """`notes` tells where a tensor's type is another than asked for."""

    type: str
    heads: Heads
    stacks: tuple[Stack, ...]
    notes: tuple[str, ...]

    @property
    def specs(self) -> list[GgufTensorSpec]:
        return [stack.spec for stack in self.stacks]

    def parts(self, path: Path, metadata: Mapping[str, Any], most_bytes: int | None = None) -> list[Part]:
        """What files there will be: `path` itself, or its parts of about `most_bytes`."""
        return parts_of(path, metadata, self.specs, most_bytes)


@dataclass
class ExportProgress:
    tensor: str = ""
    read_bytes: int = 0
    written_bytes: int = 0
    scales: ScaleCount = field(default_factory=ScaleCount)
    zeroed: list[str] = field(default_factory=list)

    def add(self, made: _Made) -> None:
        rows = made.rows
        self.tensor = rows.stack.spec.name
        self.read_bytes += sum(part.nbytes for part in rows.values.parts.values())
        self.written_bytes += made.tensor.nbytes
        self.scales += made.scales
        if made.scales.zeroed and rows.name not in self.zeroed[-1:]:
            self.zeroed.append(rows.name)


@dataclass(frozen=True)
class _Rows:
    """Some rows of one of a stack's weights, as stored."""

    stack: Stack
    source: StoredModule
    heads: Heads
    values: QuantTensor

    @property
    def name(self) -> str:
        return next(iter(self.source.parts.values()))[1].name


@dataclass(frozen=True)
class _Made:
    """The bytes that rows become, and what was cast on the way."""

    rows: _Rows
    tensor: torch.Tensor
    scales: ScaleCount


def plan_export(checkpoint: Checkpoint, type_name: str, heads: Heads) -> ExportPlan:
    """What the file will hold, in the order of its bytes. Raises RequestError for a type that is not written."""
    if type_name not in EXPORT_TYPES:
        raise RequestError(f"--type: {type_name!r} is unknown; known: {', '.join(EXPORT_TYPES)}")
    notes: list[str] = []
    stacks = list(_trunk(checkpoint, "q8_0" if type_name == "q4_0" else type_name, heads, notes))
    for layer in checkpoint.schema.expert_layers:
        for projection in PROJECTIONS:
            keys = (ExpertKey(layer, expert) for expert in range(checkpoint.schema.n_routed_experts))
            sources = tuple(checkpoint.expert_modules(key)[projection] for key in keys)
            name, shape = stack_name(layer, projection), checkpoint.schema.projection_shape(projection)
            spec = GgufTensorSpec(name, _type(name, type_name, shape, notes), (len(sources), *shape))
            stacks.append(Stack(spec, "experts", sources))
    return ExportPlan(type_name, heads, tuple(stacks), tuple(notes))


def _trunk(checkpoint: Checkpoint, type_name: str, heads: Heads, notes: list[str]) -> Iterator[Stack]:
    for name, trunk in checkpoint.schema.trunk.items():
        source = checkpoint.trunk_module(name)
        halves = split_names(name)
        if halves is not None:
            shapes = (heads.heads, heads.latent, heads.nope), (heads.heads, heads.value, heads.latent)
            for half, half_name, shape in zip("kv", halves, shapes, strict=True):
                spec = GgufTensorSpec(half_name, _type(half_name, type_name, shape, notes), shape)
                yield Stack(spec, "trunk", (source,), half)
            continue
        # the embeddings are a matrix like others in GGUF; the router is not
        kind = "trunk" if trunk.quantizable or name.endswith("embed_tokens.weight") else "kept"
        wanted = type_name if kind == "trunk" else "f32"
        spec = GgufTensorSpec(gguf_name(name), _type(gguf_name(name), wanted, trunk.shape, notes), trunk.shape)
        yield Stack(spec, kind, (source,))


def _type(name: str, wanted: str, shape: tuple[int, ...], notes: list[str]) -> GgmlType:
    if wanted in WRITTEN and shape[-1] % GROUP:
        notes.append(f"{name} is bf16: its rows of {shape[-1]} hold no whole blocks of {wanted}")
        wanted = "bf16"
    return BY_NAME[wanted]


def export(
    plan: ExportPlan,
    parts: Sequence[Part],
    report: Callable[[ExportProgress], None],
) -> ExportProgress:
    """Write the files. Raises RequestError if one exists, CheckpointError naming file and tensor for what can't be
    read, written or held by the type."""
    demand_places(parts)
    path = parts[0][0]
    needed, free = sum(map(part_bytes, parts)), shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise CheckpointError(
            f"{path}: the files take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room or name a file "
            "on another disk"
        )
    progress = ExportProgress()
    workers = ThreadPoolExecutor(THREADS + READERS, thread_name_prefix="export")
    try:
        with SplitWriter(parts) as writer:
            for made in read_ahead(_reads(plan), _convert, READ_AHEAD_BLOCKS, workers):
                writer.append(made.tensor)
                progress.add(made)
                report(progress)
            writer.finish()
    finally:
        workers.shutdown(cancel_futures=True)
    return progress


def _spans(stack: Stack, source: StoredModule) -> list[tuple[int, int]]:
    """kv_b_proj is cut by heads, which no span of rows respects: it is read whole."""
    columns = math.prod(source.shape[1:])
    return [(0, source.shape[0])] if stack.half else row_spans(source, BLOCK_WEIGHTS // columns)


def _reads(plan: ExportPlan) -> Iterator[Callable[[], _Rows]]:
    def read(stack: Stack, source: StoredModule, start: int, stop: int) -> _Rows:
        return _Rows(stack, source, plan.heads, read_rows(source, start, stop))

    for stack in plan.stacks:
        for source in stack.sources:
            for start, stop in _spans(stack, source):
                yield partial(read, stack, source, start, stop)


def _convert(read: Callable[[], _Rows]) -> _Made:
    """The work of one thread. Raises CheckpointError naming file and tensor."""
    rows, scales = read(), ScaleCount()
    try:
        return _Made(rows, _converted(rows, scales), scales)
    except CheckpointError as error:
        file = next(iter(rows.source.parts.values()))[0]
        raise CheckpointError(f"{file}: tensor {rows.name}: {error}") from error


def _converted(rows: _Rows, count: ScaleCount) -> torch.Tensor:
    """The bytes of some rows in the target's own order."""
    stack, block, heads = rows.stack, rows.values, rows.heads
    target = format_of_type(stack.spec.type)
    if not stack.half:
        copied = packed_as_blocks(block, target, count)
        if copied is not None:
            return copied
        if block.format.name == target.name:  # bf16 to bf16, and so on
            return block.parts["weight"]
    values = decoded(block)
    if stack.half:
        by_head = values.view(heads.heads, heads.rows, heads.latent)
        part = by_head[:, : heads.nope].mT if stack.half == "k" else by_head[:, heads.nope :]
        values = part.reshape(-1, part.shape[-1])
    return target.quantize(values)["weight" if target.name in PLAIN_DTYPES else BLOCKS]
