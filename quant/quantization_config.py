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
from .formats import FP8_NAME, INT4_NAMES


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
    """`groups` is empty for FP8: there the presence of weight_scale_inv tells which modules are quantized."""

    method: str
    groups: tuple[QuantGroup, ...]
    ignore: ModuleMatcher

    def allows(self, module: str, format_name: str) -> bool:
        """Whether a Linear `module` may be stored in this quantized format, as stored names go."""
        if self.method == "fp8":
            return format_name == FP8_NAME
        if self.ignore.matches(module):
            return False
        found = next((group for group in self.groups if group.targets.matches(module)), None)
        return found is not None and found.format_name == format_name


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
    _demand(raw, source, "", "format", ("pack-quantized",))
    _demand(raw, source, "", "quantization_status", ("compressed", None))
    _demand(raw, source, "", "kv_cache_scheme", (None,))
    _demand(raw, source, "", "sparsity_config", (None, {}))
    _demand(raw, source, "", "transform_config", (None, {}))
    _demand(raw, source, "", "moe_sparsity_config", (None, {}))
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _unsupported(source, "config_groups", groups, "an object of groups")
    return QuantizationConfig(
        "compressed-tensors",
        tuple(_group(group, source, f"config_groups.{name}.") for name, group in groups.items()),
        ModuleMatcher(_strings(raw.get("ignore", []), source, "ignore")),
    )


def _group(group: Mapping[str, Any], source: Path, at: str) -> QuantGroup:
    for key in ("input_activations", "output_activations"):
        _demand(group, source, at, key, (None,))
    _demand(group, source, at, "format", ("pack-quantized", None))
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _unsupported(source, f"{at}weights", weights, "an object")
    at_weights = f"{at}weights."
    _demand(weights, source, at_weights, "num_bits", (4,))
    _demand(weights, source, at_weights, "type", ("int",))
    _demand(weights, source, at_weights, "symmetric", (True, None))
    _demand(weights, source, at_weights, "strategy", ("group",))
    _demand(weights, source, at_weights, "dynamic", (False, None))
    _demand(weights, source, at_weights, "actorder", (None,))
    _demand(weights, source, at_weights, "group_size", tuple(INT4_NAMES.values()))
    name = next(name for name, size in INT4_NAMES.items() if size == weights["group_size"])
    return QuantGroup(ModuleMatcher(_strings(group.get("targets"), source, f"{at}targets")), name)


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
