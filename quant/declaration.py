"""The quantization_config that says how a folder's weights are stored: the inverse of quantization_config.py.

Targets and ignores are those that transformers with compressed-tensors was measured to read exactly. transformers takes
the first group with an "re:" target that mentions "experts" for the routed experts, and any other for the rest; so the
rest is "Linear", never a pattern that names shared_experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigError
from .formats import FP8_NAME, PACKED_INT
from .plain import PLAIN_DTYPES

EXPERTS_TARGETS = (r"re:.*mlp\.experts\..*",)
REST_TARGETS = ("Linear",)
ROUTER_IGNORE = r"re:.*mlp\.gate$"
# What Kimi-K2-Thinking names to say that only its routed experts are quantized.
REST_IGNORE = ("re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")


def declaration(experts: str, rest: str, *, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any] | None:
    """The quantization_config of a folder whose routed experts are stored in one format and all other Linear weights,
    but those of `ignore` and the router, in another. None if both are plain."""
    if experts == rest == FP8_NAME:
        return fp8_declaration()
    quantized = {name: name not in PLAIN_DTYPES for name in (experts, rest)}
    if quantized[experts] and quantized[rest]:
        return group_declaration({EXPERTS_TARGETS: experts, REST_TARGETS: rest}, [*ignore, ROUTER_IGNORE])
    if quantized[experts]:
        return group_declaration({REST_TARGETS: experts}, [*ignore, ROUTER_IGNORE, *REST_IGNORE])
    if quantized[rest]:
        return group_declaration({REST_TARGETS: rest}, [*ignore, ROUTER_IGNORE, *EXPERTS_TARGETS])
    return None


def fp8_declaration() -> dict[str, Any]:
    """FP8 throughout, as Kimi-K2-Instruct declares it: which weights are plain is told by their having no scale."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def group_declaration(groups: Mapping[tuple[str, ...], str], ignore: Sequence[str]) -> dict[str, Any]:
    """Compressed-tensors' block: for each list of targets the format of the modules that it means, the first that
    matches deciding, and the modules that are not quantized in spite of it."""
    described = {
        f"group_{number}": {
            "targets": list(targets),
            "input_activations": None,
            "output_activations": None,
            **_scheme(name),
        }
        for number, (targets, name) in enumerate(groups.items())
    }
    formats = {group["format"] for group in described.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if formats == {"pack-quantized"} else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": described,
        "ignore": list(ignore),
    }


def _scheme(name: str) -> dict[str, Any]:
    """A group's format and the arguments of its weights."""
    weights = {"symmetric": True, "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None}
    if name == FP8_NAME:
        block = {"strategy": "block", "group_size": None, "block_structure": [128, 128]}
        return {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", **block, **weights}}
    if name not in PACKED_INT:
        raise ConfigError(f"{name} can't be declared; a group holds one of {FP8_NAME}, {', '.join(PACKED_INT)}")
    bits, size = PACKED_INT[name]
    groups = {"strategy": "channel" if size is None else "group", "group_size": size, "block_structure": None}
    return {"format": "pack-quantized", "weights": {"num_bits": bits, "type": "int", **groups, **weights}}
