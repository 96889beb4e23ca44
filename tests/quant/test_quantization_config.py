"""What quantization_config may declare, and which modules a declaration means."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from k2lite.quant.errors import ConfigError
from k2lite.quant.quantization_config import ModuleMatcher, QuantizationConfig, parse_quantization_config
from tests.checkpoints import FP8_CONFIG, INT4_CONFIG
from tests.samples import examples

SOURCE = Path("folder/config.json")


def parse(raw: Any) -> QuantizationConfig:
    parsed = parse_quantization_config(raw, SOURCE)
    assert parsed is not None
    return parsed


def int4_with(path: str, value: Any) -> dict[str, Any]:
    """INT4_CONFIG with one value changed, its place written with dots."""
    return changed(INT4_CONFIG, path, value)


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(config)
    *parents, last = path.split(".")
    at: Any = raw
    for key in parents:
        at = at[key]
    at[last] = value
    return raw


WEIGHTS = "config_groups.group_0.weights"
# INT4 experts beside a kept FP8 trunk, written out: what declaration.py makes must not be its own judge.
MIXED_CONFIG: dict[str, Any] = changed(
    {
        **INT4_CONFIG,
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {
                **INT4_CONFIG["config_groups"]["group_0"],  # type: ignore[index]
                "targets": [r"re:.*mlp\.experts\..*"],
                "format": "pack-quantized",
            },
            "group_1": {
                "targets": ["Linear"],
                "format": "float-quantized",
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "block",
                    "block_structure": [128, 128],
                    "dynamic": False,
                },
            },
        },
    },
    "ignore",
    ["lm_head", r"re:.*mlp\.gate$"],
)
BLOCKS = "config_groups.group_1.weights"
EXPERT, SHARED = "model.layers.1.mlp.experts.0.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj"
ALL_NAMES = ("int4_g32", "int4_g64", "int4_g128", "int8_g128", "int8_channel", "fp8_e4m3_b128")


def int8_with(path: str, value: Any, *, strategy: str = "group") -> dict[str, Any]:
    """8 bits in groups of 128, or a scale a row, with one value of the weights changed."""
    raw = int4_with(f"{WEIGHTS}.num_bits", 8)
    size = None if strategy == "channel" else 128
    raw = changed(changed(raw, f"{WEIGHTS}.strategy", strategy), f"{WEIGHTS}.group_size", size)
    return changed(raw, f"{WEIGHTS}.{path}", value)


def test_none_declares_nothing() -> None:
    assert parse_quantization_config(None, SOURCE) is None


@pytest.mark.parametrize(
    ("folder", "method"),
    [
        ("Kimi-K2-Instruct", "fp8"),
        ("DeepSeek-V3", "fp8"),
        ("Kimi-K2.5", "compressed-tensors"),
        ("Kimi-K2.6", "compressed-tensors"),
    ],
)
def test_published_configs_are_accepted(shared: Path, folder: str, method: str) -> None:
    config = json.loads((shared / "data" / folder / "config.json").read_text())
    raw = config.get("quantization_config") or config["text_config"]["quantization_config"]
    assert parse(raw).method == method


def test_published_nvfp4_is_refused(shared: Path) -> None:
    config = json.loads((shared / "data/Kimi-K2.5-NVFP4/config.json").read_text())
    raw = config.get("quantization_config") or config["text_config"]["quantization_config"]
    with pytest.raises(ConfigError, match=r"config\.json.*quant_method is 'modelopt'; supported: 'fp8'"):
        parse(raw)


@pytest.mark.parametrize("extra", [{}, {"scale_fmt": "ue8m0"}, {"modules_to_not_convert": ["lm_head"]}, {"unknown": 1}])
def test_fp8_variants_that_are_accepted(extra: dict[str, Any]) -> None:
    parsed = parse(FP8_CONFIG | extra)
    assert parsed.allows("model.layers.0.self_attn.q_a_proj", "fp8_e4m3_b128")
    assert not parsed.allows("model.layers.0.self_attn.q_a_proj", "int4_g32")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("fp8", "quantization_config is 'fp8', expected an object"),
        ({}, "quant_method is None; supported: 'fp8', 'compressed-tensors'"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": ["fp8"]}, "quant_method is"),
        (FP8_CONFIG | {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]; supported: \[128, 128\]"),
        (FP8_CONFIG | {"weight_block_size": None}, "weight_block_size is None"),
        (FP8_CONFIG | {"fmt": "e5m2"}, "fmt is 'e5m2'; supported: 'e4m3', absent"),
        (FP8_CONFIG | {"activation_scheme": "static"}, "activation_scheme is 'static'; supported: 'dynamic'"),
        (FP8_CONFIG | {"scale_fmt": "e3m4"}, "scale_fmt is 'e3m4'"),
        (
            int4_with("format", "int-quantized"),
            "format is 'int-quantized'; supported: 'pack-quantized', 'mixed-precision'",
        ),
        (int4_with("format", "float-quantized"), "format is 'float-quantized'; supported: 'pack-quantized'"),
        (int4_with("format", "mixed-precision"), r"group_0\.format is None; supported: 'pack-quantized', 'float-q"),
        (int4_with("config_groups.group_0.format", "float-quantized"), "supported: 'pack-quantized', absent"),
        (int4_with("format", "mxfp4-pack-quantized"), "format is 'mxfp4-pack-quantized'"),
        (int4_with("quantization_status", "frozen"), "quantization_status is 'frozen'; supported: 'compressed'"),
        (int4_with("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
        (int4_with("config_groups", {}), "config_groups is {}"),
        (int4_with("config_groups", [1]), "config_groups"),
        (int4_with("config_groups", {"group_0": ["Linear"]}), "config_groups"),
        (int4_with("config_groups.group_0.format", "marlin-24"), r"config_groups\.group_0\.format is 'marlin-24'"),
        (int4_with("config_groups.group_0.targets", "Linear"), r"group_0\.targets is 'Linear'; .* a list of strings"),
        (int4_with("config_groups.group_0.targets", ["re:("]), r"targets is 're:\('.* a regular expression"),
        (int4_with("config_groups.group_0.weights", None), r"group_0\.weights is None; supported: an object"),
        (int4_with("config_groups.group_0.input_activations", {"num_bits": 8}), r"group_0\.input_activations"),
        (int4_with("config_groups.group_0.output_activations", {}), r"group_0\.output_activations"),
        (int4_with(f"{WEIGHTS}.num_bits", 3), r"weights\.num_bits is 3; supported: 4, 8"),
        (int4_with(f"{WEIGHTS}.num_bits", None), r"weights\.num_bits is None"),
        (int4_with(f"{WEIGHTS}.num_bits", 8), r"weights\.group_size is 32; supported: 128"),
        (int4_with(f"{WEIGHTS}.block_structure", [128, 128]), r"weights\.block_structure is .*; supported: absent"),
        (int4_with(f"{WEIGHTS}.num_bits", 4.0), r"weights\.num_bits is 4\.0"),
        (int4_with(f"{WEIGHTS}.type", "float"), r"weights\.type is 'float'; supported: 'int'"),
        (int4_with(f"{WEIGHTS}.symmetric", False), r"weights\.symmetric is False; supported: True"),
        (int4_with(f"{WEIGHTS}.symmetric", 1), r"weights\.symmetric is 1"),
        (int4_with(f"{WEIGHTS}.strategy", "channel"), r"weights\.strategy is 'channel'; supported: 'group'"),
        (int4_with(f"{WEIGHTS}.group_size", 16), r"weights\.group_size is 16; supported: 32, 64, 128"),
        (int4_with(f"{WEIGHTS}.group_size", None), r"weights\.group_size is None"),
        (int4_with(f"{WEIGHTS}.actorder", "group"), r"weights\.actorder is 'group'; supported: absent"),
        (int4_with(f"{WEIGHTS}.dynamic", True), r"weights\.dynamic is True"),
        (int4_with("ignore", "lm_head"), "ignore is 'lm_head'; supported: a list of strings"),
        (int4_with("ignore", [7]), "ignore is"),
        (int4_with("ignore", ["re:a{1}{2}{"]), "a regular expression"),
        (int4_with("ignore", ["re:[a"]), r"ignore is 're:\[a'"),
        (int4_with("ignore", ["re:a{99999999999999999999}"]), "ignore is 're:a"),
        (INT4_CONFIG | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (INT4_CONFIG | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (INT4_CONFIG | {"moe_sparsity_config": {"sparsity": 0.5}}, "moe_sparsity_config"),
    ],
)
def test_what_is_refused_names_key_value_and_what_is_supported(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(raw)
    assert str(caught.value).startswith(f"{SOURCE}: quantization_config")


@pytest.mark.parametrize(("size", "name"), [(32, "int4_g32"), (64, "int4_g64"), (128, "int4_g128")])
def test_the_group_size_names_the_format(size: int, name: str) -> None:
    parsed = parse(int4_with(f"{WEIGHTS}.group_size", size))
    module = "model.layers.1.mlp.experts.0.gate_proj"
    assert [n for n in ("int4_g32", "int4_g64", "int4_g128", "fp8_e4m3_b128") if parsed.allows(module, n)] == [name]


@pytest.mark.parametrize(("strategy", "name"), [("group", "int8_g128"), ("channel", "int8_channel")])
def test_eight_bits_are_told_by_their_strategy(strategy: str, name: str) -> None:
    parsed = parse(int8_with("type", "int", strategy=strategy))
    assert parsed.format_of(EXPERT) == name
    assert [n for n in ALL_NAMES if parsed.allows(EXPERT, n)] == [name]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (int8_with("group_size", 64), r"weights\.group_size is 64; supported: 128"),
        (int8_with("group_size", None), r"weights\.group_size is None; supported: 128"),
        (int8_with("group_size", 128, strategy="channel"), r"weights\.group_size is 128; supported: absent"),
        (int8_with("strategy", "tensor"), r"weights\.strategy is 'tensor'; supported: 'group', 'channel'"),
        (int8_with("symmetric", False, strategy="channel"), r"weights\.symmetric is False"),
        (int8_with("dynamic", True, strategy="channel"), r"weights\.dynamic is True"),
        (int8_with("actorder", "weight"), r"weights\.actorder is 'weight'"),
        (int8_with("type", "float"), r"weights\.type is 'float'; supported: 'int'"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.num_bits", 4), r"group_1\.weights\.num_bits is 4; supported: 8"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.type", "int"), r"group_1\.weights\.type is 'int'; supported: 'float'"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.strategy", "channel"), r"strategy is 'channel'; supported: 'block'"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.block_structure", [64, 64]), r"block_structure is \[64, 64\]; supported"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.block_structure", None), r"block_structure is None; supported"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.group_size", 128), r"group_1\.weights\.group_size is 128"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.symmetric", False), r"group_1\.weights\.symmetric is False"),
        (changed(MIXED_CONFIG, f"{BLOCKS}.dynamic", True), r"group_1\.weights\.dynamic is True"),
        (changed(MIXED_CONFIG, "config_groups.group_1.format", None), r"group_1\.format is None; supported: 'pack"),
        (changed(MIXED_CONFIG, "config_groups.group_1.format", "pack-quantized"), r"type is 'float'; supported: 'int"),
        (changed(MIXED_CONFIG, "config_groups.group_1.format", "int-quantized"), r"group_1\.format is 'int-quant"),
        (changed(MIXED_CONFIG, "config_groups.group_1.input_activations", {}), r"group_1\.input_activations"),
        (changed(MIXED_CONFIG, "format", "pack-quantized"), r"group_1\.format is 'float-quantized'"),
    ],
)
def test_what_is_refused_in_eight_bits(raw: Any, message: str) -> None:
    test_what_is_refused_names_key_value_and_what_is_supported(raw, message)


def test_int4_experts_beside_fp8() -> None:
    parsed = parse(MIXED_CONFIG)
    assert (parsed.format_of(EXPERT), parsed.format_of(SHARED)) == ("int4_g32", "fp8_e4m3_b128")
    assert (parsed.format_of("lm_head"), parsed.format_of("model.layers.1.mlp.gate")) == (None, None)
    assert parsed.fp8_scale_suffix == "weight_scale"
    assert parse(FP8_CONFIG).fp8_scale_suffix == "weight_scale_inv"
    assert parse(FP8_CONFIG).format_of(EXPERT) == "fp8_e4m3_b128"


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_kimis_ignore_list_leaves_the_routed_experts_alone(prefix: str) -> None:
    parsed = parse(INT4_CONFIG)
    for module, quantized in {
        "model.layers.1.mlp.experts.0.gate_proj": True,
        "model.layers.60.mlp.experts.383.down_proj": True,
        "model.layers.0.mlp.gate_proj": False,
        "model.layers.0.mlp.down_proj": False,
        "model.layers.1.mlp.shared_experts.up_proj": False,
        "model.layers.1.self_attn.q_a_proj": False,
    }.items():
        assert parsed.allows(prefix + module, "int4_g32") is quantized, module
    assert not parsed.allows("lm_head", "int4_g32")


def test_the_first_group_that_matches_decides() -> None:
    raw = copy.deepcopy(INT4_CONFIG)
    wide = copy.deepcopy(raw["config_groups"]["group_0"])
    wide["weights"]["group_size"] = 128
    wide["targets"] = [r"re:.*experts\.0\..*"]
    raw["config_groups"] = {"group_0": wide, "group_1": raw["config_groups"]["group_0"]}
    parsed = parse(raw)
    assert parsed.allows("model.layers.1.mlp.experts.0.up_proj", "int4_g128")
    assert not parsed.allows("model.layers.1.mlp.experts.0.up_proj", "int4_g32")
    assert parsed.allows("model.layers.1.mlp.experts.1.up_proj", "int4_g32")


@pytest.mark.parametrize(
    ("entry", "module", "expected"),
    [
        ("Linear", "any.module", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("lm_head", "lm_head.x", False),
        ("re:lm_head", "lm_head_and_more", True),
        ("re:lm_head", "model.lm_head", False),
        ("re:lm_head$", "lm_head_and_more", False),
        (".*", "lm_head", False),
    ],
)
def test_matching(entry: str, module: str, expected: bool) -> None:
    assert ModuleMatcher((entry,)).matches(module) is expected


@given(
    entry=st.sampled_from(
        ["lm_head", "re:lm_head", "re:.*self_attn", "re:model", "re:.*proj$", "re:^x", "model.layers"]
    )
    | st.text("re:.*abm_$", max_size=8).filter(lambda text: "**" not in text and ":*" not in text),
    module=st.sampled_from(["lm_head", "model.lm_head", "model.layers.0.self_attn.q_proj", "ab", "model.layers"])
    | st.text("abm_.", max_size=6),
)
@settings(max_examples=examples(200), deadline=None)
def test_matching_equals_the_compressed_tensors_package(entry: str, module: str) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    assert ModuleMatcher((entry,)).matches(module) is bool(match.match_name(module, entry))
