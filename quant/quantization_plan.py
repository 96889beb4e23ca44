"""What `quantize` will write, known to the byte before it writes anything: shards, pieces, formats.

A shard holds one layer: its routed experts in expert order, each in one run, then its trunk, then the small
weight_shape tensors. The last shard holds what stands outside the layers. A piece, an expert or a trunk tensor, is what
is written, checked and resumed as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, StoredModule
from .errors import CheckpointError
from .formats import PACKED_INT, QuantFormat, Shape
from .fp8 import COMPRESSED_TENSORS_SCALE, SCALE, Fp8Block
from .recipe import Kind, Recipe, trunk_recipe
from .safetensors_file import TensorRecord
from .schema import TrunkSpec
from .shard_writer import TensorSpec, file_bytes
from .types import PROJECTIONS, ExpertKey

WEIGHT_SHAPE = "weight_shape"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Matrix:
    """One weight on its way. `module` is its stored name without ".weight"; `specs` its tensors in the new file by
    suffix, in the order of their bytes."""

    module: str
    kind: Kind
    source: StoredModule
    target: QuantFormat
    specs: Mapping[str, TensorSpec]

    @property
    def source_format(self) -> QuantFormat:
        if self.source.format is None:
            raise CheckpointError(f"{self.module} is not whole; k2lite info lists what is wrong with the folder")
        return self.source.format

    @property
    def is_kept(self) -> bool:
        """Whether the bytes stay as they are; the name of an FP8 scale may change."""
        return self.source_format.name == self.target.name

    @property
    def nbytes(self) -> int:
        """Of all its tensors in the new file."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are copied as ranges, unseen."""
        return self.is_kept and self.kind == "experts"

    @property
    def run(self) -> tuple[TensorSpec, ...]:
        """What lies in the piece's run: all but weight_shape."""
        return tuple(spec for suffix, spec in self.specs.items() if suffix != WEIGHT_SHAPE)

    @property
    def kept_run(self) -> Iterator[tuple[Path, TensorRecord]]:
        """Where the bytes of a kept matrix's run lie now, in their new order."""
        for suffix in self.source_format.parts(self.source.shape):
            if suffix != WEIGHT_SHAPE:
                yield self.source.parts[suffix]


@dataclass(frozen=True)
class Piece:
    """An expert, a trunk tensor, or a tensor that is carried along unseen (`carried`)."""

    name: str
    matrices: tuple[Matrix, ...] = ()
    carried: tuple[Path, TensorRecord] | None = None

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        if self.carried is not None:
            record = self.carried[1]
            return (TensorSpec(record.name, record.dtype, record.shape),)
        return tuple(spec for matrix in self.matrices for spec in matrix.run)

    @property
    def nbytes(self) -> int:
        """Bytes of its run."""
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def source_nbytes(self) -> int:
        if self.carried is not None:
            return self.carried[1].nbytes
        return sum(matrix.source.nbytes for matrix in self.matrices)


@dataclass(frozen=True)
class OutputShard:
    file: str
    pieces: tuple[Piece, ...]

    @property
    def shapes(self) -> tuple[tuple[Matrix, TensorSpec], ...]:
        """The weight_shape tensors, behind all runs."""
        matrices = (matrix for piece in self.pieces for matrix in piece.matrices)
        return tuple((matrix, matrix.specs[WEIGHT_SHAPE]) for matrix in matrices if WEIGHT_SHAPE in matrix.specs)

    @property
    def tensors(self) -> list[TensorSpec]:
        """All tensors in the order of their bytes."""
        run = [spec for piece in self.pieces for spec in piece.tensors]
        return [*run, *(spec for _, spec in self.shapes)]


@dataclass(frozen=True)
class Use:
    """A row of the plan's table: how many matrices of a kind go from one format to another, and their bytes."""

    kind: Kind
    source: str
    target: str
    tensors: int
    source_bytes: int
    target_bytes: int


@dataclass(frozen=True)
class QuantizationPlan:
    """`left_out` are stored tensors that the new folder will not have, by reason."""

    recipe: Recipe
    text_only: bool
    shards: tuple[OutputShard, ...]
    left_out: Mapping[str, int]

    @property
    def settings(self) -> dict[str, Any]:
        """All that was chosen: what a resumed run must have in common with the run that it goes on with."""
        return {**self.recipe.as_dict(), "text_only": self.text_only}

    @property
    def matrices(self) -> Iterator[Matrix]:
        for shard in self.shards:
            for piece in shard.pieces:
                yield from piece.matrices

    @property
    def total_bytes(self) -> int:
        """Of all shard files."""
        return sum(file_bytes(shard.tensors) for shard in self.shards)

    def table(self) -> list[Use]:
        rows: dict[tuple[Kind, str, str], Use] = {}
        for matrix in self.matrices:
            key = (matrix.kind, matrix.source_format.name, matrix.target.name)
            before = rows.get(key, Use(*key, 0, 0, 0))
            target_bytes = before.target_bytes + matrix.nbytes
            rows[key] = Use(*key, before.tensors + 1, before.source_bytes + matrix.source.nbytes, target_bytes)
        return list(rows.values())


def plan_quantization(checkpoint: Checkpoint, recipe: Recipe, *, text_only: bool = False) -> QuantizationPlan:
    """Raises RequestError or CheckpointError for a format that can't store a weight (a group longer than its row)."""
    chosen = list(_choices(checkpoint, recipe))
    packed = any(target.name in PACKED_INT for *_, target in chosen)
    fp8 = Fp8Block(scale_suffix=COMPRESSED_TENSORS_SCALE if packed else SCALE)
    layers: dict[int, list[Piece]] = {}
    rest: list[Piece] = []
    experts: dict[ExpertKey, list[Matrix]] = {}
    for module, kind, key, source, target in chosen:
        matrix = _matrix(module, kind, source, fp8 if target.name == fp8.name else target)
        if key is not None:
            experts.setdefault(key, []).append(matrix)
            continue
        layer = _LAYER.match(module.removeprefix(checkpoint.schema.prefix))
        (layers.setdefault(int(layer[1]), []) if layer else rest).append(Piece(module, (matrix,)))
    for key in sorted(experts, reverse=True):
        layers[key.layer].insert(0, Piece(f"layer {key.layer}, expert {key.expert}", tuple(experts[key])))
    if not text_only:
        rest += [Piece(name, carried=stored) for name, stored in checkpoint.carried.items()]
    groups = [*(layers[layer] for layer in sorted(layers)), rest]
    names = (f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1))
    shards = tuple(OutputShard(name, tuple(group)) for name, group in zip(names, groups, strict=True))
    return QuantizationPlan(recipe, text_only, shards, dict(_left_out(checkpoint, text_only)))


def _choices(
    checkpoint: Checkpoint, recipe: Recipe
) -> Iterator[tuple[str, Kind, ExpertKey | None, StoredModule, QuantFormat]]:
    schema = checkpoint.schema
    for name in schema.trunk:
        stored, kind, module, target = _trunk_choice(checkpoint, name, recipe)
        yield stored, kind, None, module, target
    for layer in schema.expert_layers:
        for expert in range(schema.n_routed_experts):
            key = ExpertKey(layer, expert)
            modules = checkpoint.expert_modules(key)
            for projection in PROJECTIONS:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                stored, target = _choice(checkpoint, name, "experts", modules[projection], recipe)
                yield stored, "experts", key, modules[projection], target


def trunk_kind(name: str, spec: TrunkSpec) -> Kind:
    """What a recipe calls the trunk's weight of this canonical name."""
    if not spec.quantizable:
        return "kept"
    return "lm_head" if name.startswith("lm_head") else "trunk"


def _trunk_choice(checkpoint: Checkpoint, name: str, recipe: Recipe) -> tuple[str, Kind, StoredModule, QuantFormat]:
    kind = trunk_kind(name, checkpoint.schema.trunk[name])
    module = checkpoint.trunk_module(name)
    stored, target = _choice(checkpoint, name, kind, module, recipe)
    return stored, kind, module, target


def _choice(
    checkpoint: Checkpoint, name: str, kind: Kind, module: StoredModule, recipe: Recipe
) -> tuple[str, QuantFormat]:
    """A weight's stored name without ".weight", and its target."""
    stored = checkpoint.schema.prefix + name.removesuffix(".weight")
    if module.format is None:
        raise CheckpointError(f"{checkpoint.folder}: {stored} is not whole; k2lite info lists what is wrong")
    return stored, recipe.target(stored, kind, module.format.kept_as)


def plan_trunk(checkpoint: Checkpoint, target: str) -> dict[str, Matrix]:
    """By canonical name, the trunk's matrices that `quantize --trunk TARGET` changes. Raises RequestError or
    CheckpointError for a target that is unknown or can't store a weight."""
    recipe = trunk_recipe(target)
    matrices = {}
    for name in checkpoint.schema.trunk:
        matrix = _matrix(*_trunk_choice(checkpoint, name, recipe))
        if not matrix.is_kept:
            matrices[name] = matrix
    return matrices


def demand_fit(target: QuantFormat, module: str, shape: Shape) -> None:
    """Raise CheckpointError naming the weight that `target` can't store."""
    try:
        target.parts(shape)
    except CheckpointError as error:
        raise CheckpointError(f"{module} {list(shape)}: {error}") from error


def _matrix(module: str, kind: Kind, source: StoredModule, target: QuantFormat) -> Matrix:
    demand_fit(target, module, source.shape)
    parts = target.parts(source.shape)
    kept = source.format is not None and source.format.name == target.name
    records = [record for _, record in source.parts.values()]
    # a vector that is no module's weight (the router's bias) has its own name
    bare = kept and len(records) == 1 and records[0].name == module
    specs = {}
    for suffix, (dtype, shape) in parts.items():
        stored_as = source.parts[suffix][1].dtype if kept and suffix == WEIGHT_SHAPE else dtype
        specs[suffix] = TensorSpec(module if bare else f"{module}.{suffix}", stored_as, shape)
    return Matrix(module, kind, source, target, specs)


def _left_out(checkpoint: Checkpoint, text_only: bool) -> Iterator[tuple[str, int]]:
    for reason, names in checkpoint.ignored.items():
        count = len(names) if text_only else sum(name not in checkpoint.carried for name in names)
        if count:
            yield reason, count
