"""What config.json's quantization_config declares, in the two dialects of the Kimi-K2 and DeepSeek-V3 families.

Invariant: a declaration that is returned is one whose tensors this package multiplies exactly; others are refused,
naming key, value found and values supported. Schema: compressed-tensors 0.20; Hugging Face's fine-grained FP8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .file_reading import shown
from .formats import FP8_NAME, PACKED_INT
from .fp8 import COMPRESSED_TENSORS_SCALE, SCALE


@dataclass(frozen=True)
class ModuleMatcher:
    """A list of targets or of modules to ignore, by compressed-tensors' rule: "re:" is anchored at the start only;
    any other entry is a module's or its class's whole name."""

    entries: tuple[str, ...]

    def matches(self, module: str) -> bool:
        """Whether `module`, a Linear, is meant."""
        return "Linear" in self.entries or module in self.entries or any(p.match(module) for p in self._patterns)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(entry[3:]) for entry in self.entries if entry.startswith("re:")]


@dataclass(frozen=True)
class QuantGroup:
    """One config group: the modules it targets and the format their weights have."""

    targets: ModuleMatcher
    format_name: str


@dataclass(frozen=True)
class QuantizationConfig:
    """`groups` is empty for method "fp8": there the presence of a scale tells which modules are quantized."""

    method: str
    groups: tuple[QuantGroup, ...]
    ignore: ModuleMatcher

    def format_of(self, module: str) -> str | None:
        """The quantized format that a Linear `module` has if it has any, as stored names go; None: it has none."""
        if self.method == "fp8":
            return FP8_NAME
        if self.ignore.matches(module):
            return None
        return next((group.format_name for group in self.groups if group.targets.matches(module)), None)

    def allows(self, module: str, format_name: str) -> bool:
        """Whether a Linear `module` may be stored in this quantized format, as stored names go."""
        return self.format_of(module) == format_name

    @property
    def fp8_scale_suffix(self) -> str:
        """What this dialect calls the scales of FP8 blocks."""
        return SCALE if self.method == "fp8" else COMPRESSED_TENSORS_SCALE


def parse_quantization_config(raw: Mapping[str, Any] | None, source: Path) -> QuantizationConfig | None:
    """Parse the block, None if the model declares none. Raises ConfigError."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: quantization_config is {shown(raw)}, expected an object")
    method = raw.get("quant_method")
    if method == "fp8":
        return _fp8(raw, source)
    if method == "compressed-tensors":
        return _compressed_tensors(raw, source)
    raise _unsupported(source, "quant_method", method, "'fp8', 'compressed-tensors'")


def _fp8(raw: Mapping[str, Any], source: Path) -> QuantizationConfig:
    _demand(raw, source, "", "weight_block_size", ([128, 128],))
    _demand(raw, source, "", "fmt", ("e4m3", None))
    _demand(raw, source, "", "activation_scheme", ("dynamic", None))
    _demand(raw, source, "", "scale_fmt", ("float", "ue8m0", None))
    return QuantizationConfig("fp8", (), ModuleMatcher(()))


def _compressed_tensors(raw: Mapping[str, Any], source: Path) -> QuantizationConfig:
    _demand(raw, source, "", "format", ("pack-quantized", "mixed-precision"))
    _demand(raw, source, "", "quantization_status", ("compressed", None))
    _demand(raw, source, "", "kv_cache_scheme", (None,))
    _demand(raw, source, "", "sparsity_config", (None, {}))
    _demand(raw, source, "", "transform_config", (None, {}))
    _demand(raw, source, "", "moe_sparsity_config", (None, {}))
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _unsupported(source, "config_groups", groups, "an object of groups")
    # a group may leave its format to the whole's, unless that says that each names its own
    formats = ("pack-quantized", "float-quantized") if raw["format"] == "mixed-precision" else ("pack-quantized", None)
    return QuantizationConfig(
        "compressed-tensors",
        tuple(_group(group, formats, source, f"config_groups.{name}.") for name, group in groups.items()),
        ModuleMatcher(_strings(raw.get("ignore", []), source, "ignore")),
    )


def _group(group: Mapping[str, Any], formats: tuple[str | None, ...], source: Path, at: str) -> QuantGroup:
    for key in ("input_activations", "output_activations"):
        _demand(group, source, at, key, (None,))
    _demand(group, source, at, "format", formats)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _unsupported(source, f"{at}weights", weights, "an object")
    kind = _fp8_blocks if group.get("format") == "float-quantized" else _packed_integers
    name = kind(weights, source, f"{at}weights.")
    return QuantGroup(ModuleMatcher(_strings(group.get("targets"), source, f"{at}targets")), name)


def _fp8_blocks(weights: Mapping[str, Any], source: Path, at: str) -> str:
    _demand(weights, source, at, "num_bits", (8,))
    _demand(weights, source, at, "type", ("float",))
    _demand(weights, source, at, "strategy", ("block",))
    _demand(weights, source, at, "block_structure", ([128, 128],))
    _demand(weights, source, at, "group_size", (None,))
    _demand_plain_scales(weights, source, at)
    return FP8_NAME


def _packed_integers(weights: Mapping[str, Any], source: Path, at: str) -> str:
    _demand(weights, source, at, "num_bits", tuple(sorted({bits for bits, _ in PACKED_INT.values()})))
    _demand(weights, source, at, "type", ("int",))
    names = {size: name for name, (bits, size) in PACKED_INT.items() if bits == weights["num_bits"]}
    _demand(weights, source, at, "strategy", ("group", "channel") if None in names else ("group",))
    sizes = (None,) if weights["strategy"] == "channel" else tuple(size for size in names if size is not None)
    _demand(weights, source, at, "group_size", sizes)
    _demand(weights, source, at, "block_structure", (None,))
    _demand_plain_scales(weights, source, at)
    return names[weights.get("group_size")]


def _demand_plain_scales(weights: Mapping[str, Any], source: Path, at: str) -> None:
    """No zero points, no scales made anew for each input, no reordered columns."""
    _demand(weights, source, at, "symmetric", (True, None))
    _demand(weights, source, at, "dynamic", (False, None))
    _demand(weights, source, at, "actorder", (None,))


def _strings(value: Any, source: Path, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _unsupported(source, key, value, "a list of strings")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise _unsupported(source, key, item, f"a regular expression ({error})") from error
    return tuple(value)


def _demand(raw: Mapping[str, Any], source: Path, at: str, key: str, supported: tuple[Any, ...]) -> None:
    value = raw.get(key)
    if not any(type(value) is type(choice) and value == choice for choice in supported):
        raise _unsupported(
            source, f"{at}{key}", value, ", ".join("absent" if c is None else repr(c) for c in supported)
        )


def _unsupported(source: Path, key: str, value: Any, supported: str) -> ConfigError:
    return ConfigError(f"{source}: quantization_config.{key} is {shown(value)}; supported: {supported}")
