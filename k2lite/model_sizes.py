"""Bytes of a model as it is published, from its config alone: what `plan CONFIG.json` knows before a download.

Invariant: for the published Kimi-K2 folders the sum is exactly that of their files' tensors. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2lite.quant.errors import ConfigError
from k2lite.quant.formats import FP8_NAME, QuantFormat, format_named
from k2lite.quant.quantization_config import QuantizationConfig, parse_quantization_config
from k2lite.quant.quantization_plan import demand_fit, trunk_kind
from k2lite.quant.recipe import KEEP, trunk_recipe
from k2lite.quant.types import PROJECTIONS

from .config import ModelConfig
from .weights import checkpoint_schema

EMBEDDINGS = "model.embed_tokens.weight"
_BIAS = "e_score_correction_bias"
_BF16_BYTES = 2


@dataclass(frozen=True)
class ModelSizes:
    """Bytes: the trunk and its embedding table, one routed expert, all of them, and what is stored and not used.
    `converted` is how many of the trunk's matrices change their format while loading."""

    trunk: int
    embeddings: int
    expert: int
    experts: int
    unused: int
    converted: int = 0

    @property
    def total(self) -> int:
        return self.trunk + self.experts + self.unused

    @property
    def trunk_read(self) -> int:
        """What one token reads of the trunk: all but the table, of which it reads a row."""
        return self.trunk - self.embeddings


def published_sizes(config: ModelConfig, raw: Mapping[str, Any], *, trunk: str = KEEP) -> ModelSizes:
    """Sizes of the folder that this config.json (`raw`) is published with; those of the trunk as they are once it is
    converted to the format `trunk` while loading. Raises RequestError for an unknown format, CheckpointError for one
    that can't store a weight."""
    recipe = trunk_recipe(trunk)
    declared = parse_quantization_config(config.quantization_config, config.source)
    schema = checkpoint_schema(config)
    sizes: dict[str, int] = {}
    converted = 0
    for name, spec in schema.trunk.items():
        module = name.removesuffix(".weight")
        stored = _format(schema.prefix, module, declared if spec.quantizable else None)
        target = recipe.target(schema.prefix + module, trunk_kind(name, spec), stored)
        demand_fit(target, schema.prefix + module, spec.shape)
        sizes[name] = target.nbytes(spec.shape)
        converted += target.name != stored.name
    at = f"model.layers.{config.num_hidden_layers - 1}.mlp.experts.0"
    expert = sum(
        _format(schema.prefix, f"{at}.{name}", declared).nbytes(schema.projection_shape(name)) for name in PROJECTIONS
    )
    return ModelSizes(
        trunk=sum(sizes.values()),
        embeddings=sizes[EMBEDDINGS],
        expert=expert,
        experts=expert * len(config.moe_layers) * config.n_routed_experts,
        unused=_unused(config, raw, declared),
        converted=converted,
    )


def _format(prefix: str, module: str, declared: QuantizationConfig | None) -> QuantFormat:
    name = None if declared is None else declared.format_of(prefix + module)
    if declared is not None and declared.format_of(module) is None:
        name = None  # K2.5 and later ignore "lm_head", and its stored name has the prefix
    if name == FP8_NAME and declared is not None and declared.method == "fp8" and module == "lm_head":
        name = None  # that dialect names no modules; the head is published in BF16
    return format_named(name or ("f32" if module.endswith(_BIAS) else "bf16"))


def _unused(config: ModelConfig, raw: Mapping[str, Any], declared: QuantizationConfig | None) -> int:
    if config.model_type == "kimi_k25":
        return _vision_bytes(config, raw)
    if config.model_type == "kimi_k2" and declared is not None and declared.method == "fp8":
        # left-over rotary frequencies, one vector a layer, as Kimi-K2-Instruct is published
        return config.num_hidden_layers * (config.hidden_size // 128) * _BF16_BYTES
    return 0


def _vision_bytes(config: ModelConfig, raw: Mapping[str, Any]) -> int:
    """The vision tower and its projector, BF16: linear layers with biases, norms with weight and bias."""
    vision = raw.get("vision_config")
    if not isinstance(vision, Mapping):
        return 0

    def number(key: str) -> int:
        value = vision.get(key)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{config.source}: vision_config.{key} is {value!r}; supported: an integer of 1 or more")
        return value

    width, inner = number("vt_hidden_size"), number("vt_intermediate_size")
    merged = width
    for side in vision.get("merge_kernel_size", ()):
        merged *= int(side)
    norm = 2 * width
    block = 2 * norm + _linear(width, 3 * width) + _linear(width, width) + _linear(width, inner) + _linear(inner, width)
    patch = _linear(3 * number("patch_size") ** 2, width)
    positions = number("init_pos_emb_height") * number("init_pos_emb_width") * width
    projector = norm + _linear(merged, merged) + _linear(merged, config.hidden_size)
    return _BF16_BYTES * (number("vt_num_hidden_layers") * block + norm + patch + positions + projector)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
