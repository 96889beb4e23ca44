"""Which stored tensors a slice has, and at which byte of which shard each lies, all known before a weight is made.

A shard holds a layer, the first one the embeddings, the last one the final norm and the head. In a shard the routed
experts come first, in expert order, each one unbroken run; weight_shape tensors stand apart behind them. The header is
padded with spaces so that the first expert begins on a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from k2lite.config import ModelConfig
from k2lite.quant.formats import QuantFormat, Shape
from k2lite.quant.schema import CheckpointSchema
from k2lite.quant.shard_writer import TensorSpec, header_bytes
from k2lite.quant.types import PROJECTIONS
from k2lite.weights import checkpoint_schema

from .config import SliceFormats

SHAPE_SUFFIX = "weight_shape"


@dataclass(frozen=True)
class Weight:
    """One weight of the model: its stored name with ".weight", its format, and the mean and spread of its values."""

    name: str
    shape: Shape
    format: QuantFormat
    mean: float
    std: float

    def stored_name(self, suffix: str) -> str:
        """The name of one of its stored tensors; the router's bias has no ".weight" and is stored under its own."""
        return f"{self.name.removesuffix('weight')}{suffix}" if self.name.endswith(".weight") else self.name


@dataclass(frozen=True)
class StoredTensor:
    """A part of a weight, `offset` bytes behind the shard's header."""

    weight: Weight
    suffix: str
    dtype: torch.dtype
    shape: Shape
    offset: int

    @property
    def name(self) -> str:
        return self.weight.stored_name(self.suffix)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class ShardLayout:
    """A file of the folder: its weights in the order they are made, its tensors in the order of their bytes."""

    file: str
    weights: tuple[Weight, ...]
    tensors: tuple[StoredTensor, ...]

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def header(self) -> bytes:
        """The file up to its data: a whole number of pages."""
        return header_bytes([TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors])


def slice_layout(config: ModelConfig, formats: SliceFormats) -> list[ShardLayout]:
    """All shards of the folder. Raises CheckpointError for an unknown format or one that a shape does not allow."""
    schema = checkpoint_schema(config)
    trunk = {name: _trunk_weight(name, schema, formats, config) for name in schema.trunk}
    groups: list[tuple[list[Weight], list[Weight]]] = [([], [trunk["model.embed_tokens.weight"]])]
    for layer in range(config.num_hidden_layers):
        experts = list(_experts(layer, schema, formats, config)) if layer in schema.expert_layers else []
        groups.append((experts, [w for name, w in trunk.items() if name.startswith(f"model.layers.{layer}.")]))
    groups.append(([], [trunk["model.norm.weight"], trunk["lm_head.weight"]]))
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", experts, rest)
        for number, (experts, rest) in enumerate(groups, 1)
    ]


def _shard(file: str, experts: Sequence[Weight], rest: Sequence[Weight]) -> ShardLayout:
    weights = (*experts, *rest)
    parts = [
        (weight, suffix, *part) for weight in weights for suffix, part in weight.format.parts(weight.shape).items()
    ]
    parts.sort(key=lambda part: part[1] == SHAPE_SUFFIX)  # stable: all else stays in order
    tensors, offset = [], 0
    for weight, suffix, dtype, shape in parts:
        tensors.append(StoredTensor(weight, suffix, dtype, shape, offset))
        offset += tensors[-1].nbytes
    return ShardLayout(file, weights, tuple(tensors))


def _experts(layer: int, schema: CheckpointSchema, formats: SliceFormats, config: ModelConfig) -> Iterator[Weight]:
    stored = formats.named(formats.experts)
    for expert in range(schema.n_routed_experts):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
            shape = schema.projection_shape(projection)
            yield Weight(schema.prefix + name, shape, stored, 0.0, _spread(name, shape, config))


def _trunk_weight(name: str, schema: CheckpointSchema, formats: SliceFormats, config: ModelConfig) -> Weight:
    spec = schema.trunk[name]
    stored, mean = "bf16", 0.0
    if name.endswith("e_score_correction_bias"):
        stored = "f32"
    elif len(spec.shape) == 1:
        mean = 1.0
    elif spec.quantizable:
        stored = formats.lm_head if name == "lm_head.weight" else formats.trunk
    return Weight(schema.prefix + name, spec.shape, formats.named(stored), mean, _spread(name, spec.shape, config))


def _spread(name: str, shape: Shape, config: ModelConfig) -> float:
    """The standard deviation that keeps activations of order 1. Embeddings have 1 themselves; a matrix keeps the size
    of what it is given; what is added to the residual stream is smaller by the square root of the number of additions
    (GPT-2's rule), so that depth does not matter. The router's logits have a spread of 1: it chooses, and its bias
    moves only close decisions."""
    if name.endswith("e_score_correction_bias"):
        return 0.02
    if len(shape) == 1:
        return 0.1
    if name == "model.embed_tokens.weight":
        return 1.0
    additions = 2 * config.num_hidden_layers if "o_proj" in name or "down_proj" in name else 1
    return float((shape[1] * additions) ** -0.5)
