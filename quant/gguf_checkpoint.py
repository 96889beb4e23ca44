"""A GGUF file of Kimi-K2 or DeepSeek-V3 as a checkpoint: the same mapping from Hugging Face's names to weights.

Nothing is copied: an expert is a range of its layer's stack, and kv_b_proj is joined from its two halves as it is read.
For `quantize` to read from; the engine runs folders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint, Stored, StoredModule
from .errors import CheckpointError, RequestError
from .formats import Parts, QuantFormat, ScaleSearch, Shape, format_named
from .ggml_blocks import BLOCKS, format_of_type
from .gguf_file import GgufFile, GgufTensor
from .gguf_names import Heads, fused_stack_name, gguf_name, split_names, stack_name
from .plain import PLAIN_DTYPES
from .safetensors_file import TensorRecord
from .schema import CheckpointSchema
from .shards import Shard
from .types import PROJECTIONS, ExpertKey

KEY, VALUE = "attn_k_b", "attn_v_b"
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")


@dataclass(frozen=True)
class JoinedKvB(QuantFormat):
    """kv_b_proj from attn_k_b, rows [heads * latent] of nope columns, and attn_v_b, rows [heads * value] of latent."""

    key: QuantFormat
    value: QuantFormat
    heads: Heads

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.key.name}+{self.value.name}"

    @property
    def row_multiple(self) -> int:  # type: ignore[override]
        return self.heads.rows

    @property
    def kept_as(self) -> QuantFormat:
        """f16 and f32 stay what they are; the halves of a quantized pair are cut along different axes, so bf16."""
        same = self.key.name if self.key.name == self.value.name and self.key.name in PLAIN_DTYPES else "bf16"
        return format_named(same)

    def part_rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        each = self.heads.latent if suffix == KEY else self.heads.value
        return start // self.heads.rows * each, stop // self.heads.rows * each

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        heads = shape[0] // self.heads.rows
        key = self.key.parts((heads * self.heads.latent, self.heads.nope))
        value = self.value.parts((heads * self.heads.value, self.heads.latent))
        return {KEY: next(iter(key.values())), VALUE: next(iter(value.values()))}

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        sizes, heads = self.heads, shape[0] // self.heads.rows
        key = _values(self.key, parts[KEY], (heads * sizes.latent, sizes.nope))
        value = _values(self.value, parts[VALUE], (heads * sizes.value, sizes.latent))
        by_head = (key.view(heads, sizes.latent, sizes.nope).mT, value.view(heads, sizes.value, sizes.latent))
        return torch.cat(by_head, dim=1).reshape(shape)

    def quantize(
        self,
        weight: torch.Tensor,  # noqa: ARG002
        *,
        scale_search: ScaleSearch = "amax",  # noqa: ARG002
        importance: torch.Tensor | None = None,  # noqa: ARG002
    ) -> dict[str, torch.Tensor]:
        raise RequestError(f"{self.name} is read and not written: the export writes the halves as tensors of their own")


def _values(stored_as: QuantFormat, tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    return stored_as.dequantize({"weight" if stored_as.name in PLAIN_DTYPES else BLOCKS: tensor}, shape)


class GgufCheckpoint(Checkpoint):
    """Made by `read`; `folder` is the file. `problems` lists what is missing, misshapen or unknown."""

    @classmethod
    def read(cls, source: GgufFile, schema: CheckpointSchema, heads: Heads) -> GgufCheckpoint:
        """Map every tensor of `source`. Reads no weights and raises nothing: see raise_for_problems."""
        checkpoint = cls(source.path, schema)
        checkpoint.shards = tuple(Shard(path, path.stat().st_size) for path in source.files)
        checkpoint._map(source, heads)
        return checkpoint

    def _map(self, source: GgufFile, heads: Heads) -> None:
        left = dict(source.tensors)
        problems = [*self._map_trunk(left, heads), *self._map_experts(left)]
        for name, tensor in left.items():
            reason = self._reason_to_ignore(name)
            if reason is None:
                problems.append(f"{tensor.file}: tensor {name} is not part of this model")
            else:
                self.ignored.setdefault(reason, []).append(name)
        self.problems = tuple(problems)

    def _map_trunk(self, left: dict[str, GgufTensor], heads: Heads) -> Iterator[str]:
        for name, spec in self.schema.trunk.items():
            halves = split_names(name)
            if halves is not None and halves[0] in left and halves[1] in left:
                yield from self._join(name, spec.shape, left.pop(halves[0]), left.pop(halves[1]), heads)
                continue
            tensor = left.pop(gguf_name(name), None)
            if tensor is None and name == "lm_head.weight" and "model.embed_tokens.weight" in self._trunk:
                yield f"{self.folder}: tensor output.weight is missing (tied embeddings are not supported)"
            elif tensor is None:
                wanted = " and ".join(halves) if halves else gguf_name(name)
                yield f"{self.folder}: tensor {wanted} {list(spec.shape)} is missing"
            elif tensor.shape != spec.shape:
                yield _misshapen(tensor, spec.shape)
            else:
                self._trunk[name] = _module(tensor, spec.shape, name)

    def _join(self, name: str, shape: Shape, key: GgufTensor, value: GgufTensor, heads: Heads) -> Iterator[str]:
        wanted = (heads.heads, heads.latent, heads.nope), (heads.heads, heads.value, heads.latent)
        for tensor, expected in zip((key, value), wanted, strict=True):
            if tensor.shape != expected:
                yield _misshapen(tensor, expected)
                return
        joined = JoinedKvB(format_of_type(key.type), format_of_type(value.type), heads)
        parts: dict[str, Stored] = {}
        for suffix, tensor in ((KEY, key), (VALUE, value)):
            matrix_shape = (math.prod(tensor.shape[:-1]), tensor.shape[-1])
            parts[suffix] = _stored(tensor, matrix_shape, 0, tensor.name)
        self._trunk[name] = StoredModule(joined, shape, parts)

    def _map_experts(self, left: dict[str, GgufTensor]) -> Iterator[str]:
        count = self.schema.n_routed_experts
        for layer in self.schema.expert_layers:
            fused = left.pop(fused_stack_name(layer), None)
            for projection in PROJECTIONS:
                rows, columns = self.schema.projection_shape(projection)
                stack, first, step = left.pop(stack_name(layer, projection), None), 0, rows
                if stack is None and fused is not None and projection != "down_proj":
                    stack, first, step = fused, rows if projection == "up_proj" else 0, 2 * rows
                expected = (count, step, columns)
                if stack is None:
                    yield f"{self.folder}: tensor {stack_name(layer, projection)} {list(expected)} is missing"
                elif stack.shape != expected:
                    yield _misshapen(stack, expected)
                else:
                    for expert in range(count):
                        module = _module(stack, (rows, columns), stack.name, first_row=expert * step + first)
                        self._experts.setdefault(ExpertKey(layer, expert), {})[projection] = module

    def _reason_to_ignore(self, name: str) -> str | None:
        layers = 1 + max((int(item.split(".")[2]) for item in self.schema.trunk if ".layers." in item), default=0)
        block = _BLOCK.match(name)
        if block and int(block[1]) >= layers:
            return "multi-token prediction layer (skipped)"
        return "rotary factors (they follow from the config)" if name == _ROPE_FACTORS else None


def _module(tensor: GgufTensor, shape: Shape, name: str, *, first_row: int = 0) -> StoredModule:
    """A matrix or vector that is `tensor`, or the rows of it that begin with `first_row`. A plain one is recorded under
    `name`, since a folder stores a vector that is no module's weight under its own name."""
    stored_as = format_of_type(tensor.type)
    suffix = "weight" if stored_as.name in PLAIN_DTYPES else BLOCKS
    if suffix == BLOCKS and len(shape) != 2:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is {stored_as.name}, expected f32, f16 or bf16")
    return StoredModule(stored_as, shape, {suffix: _stored(tensor, shape, first_row, name)})


def _stored(tensor: GgufTensor, shape: Shape, first_row: int, name: str) -> Stored:
    """Where rows of a tensor lie, as safetensors would describe them."""
    kind = tensor.type
    row_bytes = shape[-1] // kind.elements * kind.nbytes
    plain = PLAIN_DTYPES.get(kind.name)
    stored_shape = shape if plain is not None else (*shape[:-1], row_bytes)
    nbytes = math.prod(shape[:-1]) * row_bytes
    return tensor.file, TensorRecord(
        name, plain or torch.uint8, stored_shape, tensor.offset + first_row * row_bytes, nbytes
    )


def _misshapen(tensor: GgufTensor, expected: Shape) -> str:
    return f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}"
