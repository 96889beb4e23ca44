"""A model folder as a lazy mapping from names to weights, checked against what the model must have.

Opening reads every header and no weights; all that is wrong is collected in `problems`. `trunk` reads one tensor now;
`expert` says where one routed expert's bytes lie, for a store to read. Does not know when or where to.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from .checksums import demand_checksum, expert_piece, read_checksums
from .direct_reading import read_direct_into
from .errors import CheckpointError
from .expert_layout import check_weight_shape, expert_extents, expert_layout
from .file_reading import read_exactly
from .formats import QuantFormat, Shape
from .module_format import QUANT_SUFFIXES, module_format
from .quantization_config import QuantizationConfig
from .safetensors_file import TensorRecord
from .schema import CheckpointSchema
from .shards import Shard, ShardSet, read_shards
from .types import PROJECTIONS, ExpertKey, ExpertLayout, Extent, QuantTensor

Stored = tuple[Path, TensorRecord]
# numbers as they are printed only: "07" would be a second name of expert 7
_NUMBER = "(0|[1-9][0-9]{0,5})"
_EXPERT = re.compile(
    rf"model\.layers\.{_NUMBER}\.mlp\.experts\.{_NUMBER}\.(gate_proj|up_proj|down_proj)\.(weight[a-z_]*)"
)
_SHOWN_PROBLEMS = 10
Allocate = Callable[[int], torch.Tensor]  # uint8 of so many bytes, on the CPU
# From here on past the page cache, which the trunk would fill with bytes that nobody reads again.
_DIRECT_BYTES = 1 << 20


# The class of routed experts in `Checkpoint.formats`.
EXPERTS_KIND = "routed experts"


def _plain_memory(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class FormatUse:
    """How many weights are stored in one format, and their bytes."""

    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredModule:
    """One weight: its format (None if anything is wrong with it), its shape, and its stored tensors by suffix."""

    format: QuantFormat | None
    shape: Shape
    parts: Mapping[str, Stored]

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for _, record in self.parts.values())


class Checkpoint:
    """Made by `open`. `shards` are the files; `ignored` lists stored names that are known and not needed, by reason,
    and `carried` where those of them lie that belong to the model all the same (its vision tower); `problems` is what
    makes the folder unusable, `notes` what is odd and does no harm; `checksums` are those that its manifest knows."""

    def __init__(self, folder: Path, schema: CheckpointSchema) -> None:
        self.folder = folder
        self.schema = schema
        self.shards: tuple[Shard, ...] = ()
        self.problems: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.ignored: dict[str, list[str]] = {}
        self.carried: dict[str, Stored] = {}
        self.checksums: dict[str, str] = {}
        self._trunk: dict[str, StoredModule] = {}
        self._experts: dict[ExpertKey, dict[str, StoredModule]] = {}

    @classmethod
    def open(cls, folder: Path, schema: CheckpointSchema, quantization: QuantizationConfig | None) -> Checkpoint:
        """Read all headers of `folder`. Raises CheckpointError only where there is nothing to look at; all else is
        in `problems`."""
        checkpoint = cls(folder, schema)
        checkpoint.checksums = read_checksums(folder)
        with _collection_paused():
            checkpoint._fill(read_shards(folder), quantization)
        return checkpoint

    def _fill(self, found: ShardSet, quantization: QuantizationConfig | None) -> None:
        self.shards = tuple(found.shards)
        self.notes = tuple(found.notes)
        trunk, experts, extra = self._classify(found.tensors)
        reported = {_trunk_owner(name.removeprefix(self.schema.prefix))[0] for name in found.reported}
        problems = [*found.problems, *extra]
        problems += self._add_trunk(trunk, quantization, reported)
        problems += self._add_experts(experts, quantization, reported)
        self.problems = tuple(problems)

    def raise_for_problems(self) -> None:
        """Raise CheckpointError if opening found any, with their number and the first few."""
        if not self.problems:
            return
        more = len(self.problems) - _SHOWN_PROBLEMS
        rest = [f"... and {more} more: k2lite info {self.folder} lists all"] if more > 0 else []
        shown = "\n  ".join([*self.problems[:_SHOWN_PROBLEMS], *rest])
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        raise CheckpointError(f"{self.folder}: the weights can't be used, {count}:\n  {shown}")

    def trunk(self, name: str, memory: Allocate = _plain_memory) -> QuantTensor:
        """Read a trunk tensor by its canonical name into what `memory` gives. Raises CheckpointError naming file and
        tensor."""
        module = self._trunk.get(name)
        if module is None or module.format is None:
            raise self._unusable(f"tensor {self.schema.prefix}{name}")
        parts = {suffix: self._read(*stored, memory) for suffix, stored in module.parts.items()}
        check_weight_shape(parts, module.shape, f"{self.folder}: {self.schema.prefix}{name}")
        tensor = QuantTensor(module.format, module.shape, parts)
        file = next(iter(module.parts.values()))[0]
        demand_checksum(self.checksums.get(self.trunk_piece(name)), [tensor], f"{file}: {self.schema.prefix}{name}")
        return tensor

    def trunk_piece(self, name: str) -> str:
        """The name of a trunk tensor in the manifest."""
        return self.schema.prefix + name.removesuffix(".weight")

    def expert(self, key: ExpertKey) -> ExpertLayout:
        """Where an expert's bytes lie. Raises CheckpointError if it is not whole."""
        modules = self._experts.get(key, {})
        formats = {projection: module.format for projection, module in modules.items() if module.format is not None}
        if len(formats) != len(PROJECTIONS):
            raise self._unusable(f"layer {key.layer}, expert {key.expert}")
        return expert_layout(
            key,
            {
                (projection, suffix): stored
                for projection in PROJECTIONS
                for suffix, stored in modules[projection].parts.items()
            },
            formats,
            {projection: self.schema.projection_shape(projection) for projection in PROJECTIONS},
            self.checksums.get(expert_piece(key)),
        )

    def expert_extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        """The extents of `expert(key)` alone: quick enough to ask for every expert."""
        return expert_extents(stored for module in self._experts[key].values() for stored in module.parts.values())

    def expert_keys(self) -> Iterator[ExpertKey]:
        """All routed experts, by layer."""
        for layer in self.schema.expert_layers:
            for expert in range(self.schema.n_routed_experts):
                yield ExpertKey(layer, expert)

    def trunk_module(self, name: str) -> StoredModule:
        """How a trunk tensor is stored, by its canonical name."""
        return self._trunk[name]

    def expert_modules(self, key: ExpertKey) -> Mapping[str, StoredModule]:
        """How a routed expert's projections are stored."""
        return self._experts[key]

    def fingerprint(self) -> str:
        """Tells models apart whatever their matrices are stored in: xxh3 of all vectors of the trunk (norms, the
        routers' biases), which every format keeps, as float32."""
        digest = xxhash.xxh3_64()
        for name, spec in self.schema.trunk.items():
            if len(spec.shape) == 1:
                digest.update(self.trunk(name).dequantize().numpy().tobytes())
        return str(digest.hexdigest())

    def _unusable(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: {what} is not there as this model needs it; k2lite info {self.folder} lists all problems"
        )

    @property
    def trunk_bytes(self) -> int:
        return sum(module.nbytes for module in self._trunk.values())

    @property
    def experts_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(_expert_nbytes(modules) for modules in self._experts.values())

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest routed expert."""
        return max(map(_expert_nbytes, self._experts.values()), default=0)

    def formats(self) -> dict[str, dict[str, FormatUse]]:
        """For each class of tensors the formats in use."""
        table: dict[str, dict[str, FormatUse]] = {}
        for kind, module in self._modules_by_kind():
            if module.format is None:
                continue
            uses = table.setdefault(kind, {})
            before = uses.get(module.format.name, FormatUse(0, 0))
            uses[module.format.name] = FormatUse(before.tensors + 1, before.nbytes + module.nbytes)
        return table

    def _modules_by_kind(self) -> Iterator[tuple[str, StoredModule]]:
        for name, module in self._trunk.items():
            yield _kind(name), module
        for modules in self._experts.values():
            for module in modules.values():
                yield EXPERTS_KIND, module

    def _classify(
        self, tensors: Mapping[str, Stored]
    ) -> tuple[dict[str, dict[str, Stored]], dict[ExpertKey, dict[str, dict[str, Stored]]], list[str]]:
        """Stored tensors as trunk (by canonical name, then suffix), experts (by key, projection, suffix), and a
        problem for each that is neither and is not known to be ignored."""
        schema = self.schema
        ignored = [(re.compile(item.pattern), item) for item in schema.ignored]
        layers = frozenset(schema.expert_layers)
        trunk: dict[str, dict[str, Stored]] = {}
        experts: dict[ExpertKey, dict[str, dict[str, Stored]]] = {}
        extra: list[str] = []
        for stored_name, stored in tensors.items():
            if stored_name.startswith(schema.prefix):
                name = stored_name[len(schema.prefix) :]
                match = _EXPERT.fullmatch(name)
                if match and int(match[1]) in layers and int(match[2]) < schema.n_routed_experts:
                    key = ExpertKey(int(match[1]), int(match[2]))
                    experts.setdefault(key, {}).setdefault(match[3], {})[match[4]] = stored
                    continue
                owner, suffix = _trunk_owner(name)
                if owner in schema.trunk:
                    trunk.setdefault(owner, {})[suffix] = stored
                    continue
            item = next((item for pattern, item in ignored if pattern.fullmatch(stored_name)), None)
            if item is None:
                extra.append(f"{stored[0]}: tensor {stored_name} is not part of this model (see config.json)")
                continue
            self.ignored.setdefault(item.reason, []).append(stored_name)
            if item.carried:
                self.carried[stored_name] = stored
        return trunk, experts, extra

    def _add_trunk(
        self, found: Mapping[str, Mapping[str, Stored]], declared: QuantizationConfig | None, reported: set[str]
    ) -> Iterator[str]:
        for name, spec in self.schema.trunk.items():
            parts = found.get(name)
            if parts is not None:
                module, problems = self._module(
                    name.removesuffix(".weight"), spec.shape, parts, declared, quantizable=spec.quantizable
                )
                self._trunk[name] = module
            else:
                problems = [f"{self.folder}: tensor {self.schema.prefix}{name} {list(spec.shape)} is missing"]
            if name not in reported:
                yield from problems

    def _add_experts(
        self,
        found: Mapping[ExpertKey, Mapping[str, Mapping[str, Stored]]],
        declared: QuantizationConfig | None,
        reported: set[str],
    ) -> Iterator[str]:
        for layer in self.schema.expert_layers:
            for expert in range(self.schema.n_routed_experts):
                key = ExpertKey(layer, expert)
                for projection in PROJECTIONS:
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                    parts = found.get(key, {}).get(projection)
                    shape = self.schema.projection_shape(projection)
                    if parts is not None:
                        module, problems = self._module(name, shape, parts, declared, quantizable=True)
                        self._experts.setdefault(key, {})[projection] = module
                    else:
                        problems = [f"{self.folder}: expert {self.schema.prefix}{name} {list(shape)} is missing"]
                    if f"{name}.weight" not in reported:
                        yield from problems

    def _module(
        self,
        name: str,
        shape: Shape,
        parts: Mapping[str, Stored],
        declared: QuantizationConfig | None,
        *,
        quantizable: bool,
    ) -> tuple[StoredModule, list[str]]:
        stored_name = self.schema.prefix + name
        records = {suffix: record for suffix, (_, record) in parts.items()}
        format_found, found = module_format(stored_name, shape, records, declared, quantizable=quantizable)
        problems = []
        for suffix, problem in found:
            file, record = parts[suffix] if suffix else next(iter(parts.values()))
            problems.append(f"{file}: {f'tensor {record.name}' if suffix else stored_name} {problem}")
        return StoredModule(format_found, shape, parts), problems

    def _read(self, path: Path, record: TensorRecord, memory: Allocate) -> torch.Tensor:
        buffer, what = memory(record.nbytes), f"tensor {record.name}"
        if record.nbytes >= _DIRECT_BYTES:
            read_direct_into(path, record.offset, buffer, what)
        else:
            read_exactly(path, record.offset, buffer, what)
        return buffer.view(record.dtype).view(record.shape)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Opening makes a million objects that all stay; looking for garbage among them doubles the time it takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _trunk_owner(name: str) -> tuple[str, str]:
    """The canonical name of the weight that a stored tensor belongs to, and the tensor's suffix there. A tensor that
    is no module's weight (the router's bias) is its own owner."""
    module, _, suffix = name.rpartition(".")
    if suffix in QUANT_SUFFIXES:
        return f"{module}.weight", suffix
    return name, "weight"


def _expert_nbytes(modules: Mapping[str, StoredModule]) -> int:
    return sum(module.nbytes for module in modules.values())


def _kind(name: str) -> str:
    """The class of a trunk tensor, as `k2lite info` names it."""
    for part, kind in (
        ("norm", "norms"),
        ("self_attn.", "attention"),
        ("mlp.shared_experts.", "shared experts"),
        ("mlp.gate.", "router"),
        ("mlp.", "dense mlp"),
        ("embed_tokens", "embeddings"),
    ):
        if part in name:
            return kind
    return "head"
