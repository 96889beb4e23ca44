"""What is declared is what is read: by our own parser, by the compressed-tensors package, and of a folder on disk."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.declaration import EXPERTS_TARGETS, REST_TARGETS, declaration, group_declaration
from k2lite.quant.errors import ConfigError
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.formats import PACKED_INT, QuantFormat, format_named
from k2lite.quant.fp8 import Fp8Block
from k2lite.quant.quantization_config import QuantizationConfig, parse_quantization_config
from k2lite.quant.types import PROJECTIONS, ExpertKey
from tests.checkpoints import FP8_CONFIG, INT4_CONFIG, Weights, random_weights, tiny_config
from tests.quant.damage import schema_of
from tests.quant.numbers_in_numpy import random_matrix

FP8 = "fp8_e4m3_b128"
QUANTIZED = (*PACKED_INT, FP8)
PAIRS = list(itertools.product((*QUANTIZED, "bf16"), repeat=2))
EXPERT = "model.layers.1.mlp.experts.0.gate_proj"
REST = (
    "model.layers.0.self_attn.q_a_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.shared_experts.down_proj",
    "model.layers.1.self_attn.kv_a_proj_with_mqa",
)
PLAIN = ("model.layers.1.mlp.gate", "lm_head")


def parse(raw: dict[str, Any]) -> QuantizationConfig:
    parsed = parse_quantization_config(json.loads(json.dumps(raw)), Path("config.json"))
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(("experts", "rest"), PAIRS)
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_what_is_declared_is_what_is_parsed(experts: str, rest: str, prefix: str) -> None:
    raw = declaration(experts, rest)
    if (experts, rest) == ("bf16", "bf16"):
        assert raw is None
        return
    assert raw is not None
    parsed = parse(raw)
    assert parsed.format_of(prefix + EXPERT) == (None if experts == "bf16" else experts)
    assert parsed.allows(prefix + EXPERT, experts) is (experts != "bf16")
    for module in REST:
        assert parsed.format_of(prefix + module) == (None if rest == "bf16" else rest), module
    if parsed.method != "fp8":  # there a scale tells
        assert [parsed.format_of(module) for module in PLAIN] == [None, None]


def test_the_head_is_declared_unless_it_is_ignored() -> None:
    assert parse(declaration("int4_g32", "int8_g128", ignore=()) or {}).format_of("lm_head") == "int8_g128"


def test_fp8_throughout_is_declared_as_moonshot_does() -> None:
    assert declaration(FP8, FP8) == FP8_CONFIG


def test_int4_experts_alone_are_declared_as_moonshot_does() -> None:
    """But that a group names its format, and that the router is ignored by name."""
    raw = declaration("int4_g32", "bf16")
    assert raw is not None
    assert raw["config_groups"]["group_0"].pop("format") == "pack-quantized"
    raw["ignore"].remove(r"re:.*mlp\.gate$")
    assert raw == INT4_CONFIG


@pytest.mark.parametrize(("experts", "rest"), [("int4_g32", "int8_g128"), ("int4_g32", FP8), ("int8_channel", FP8)])
def test_groups_are_those_that_were_measured(experts: str, rest: str) -> None:
    raw = declaration(experts, rest)
    assert raw is not None
    assert raw["format"] == ("mixed-precision" if rest == FP8 else "pack-quantized")
    first, second = raw["config_groups"].values()
    assert (first["targets"], second["targets"]) == ([r"re:.*mlp\.experts\..*"], ["Linear"])
    assert (first["format"], second["format"]) == (
        "pack-quantized",
        "float-quantized" if rest == FP8 else "pack-quantized",
    )
    assert raw["ignore"] == ["lm_head", r"re:.*mlp\.gate$"]
    if rest == FP8:
        weights = second["weights"]
        assert (weights["strategy"], weights["block_structure"], weights["num_bits"], weights["type"]) == (
            "block",
            [128, 128],
            8,
            "float",
        )


def test_a_format_that_no_group_can_hold() -> None:
    with pytest.raises(ConfigError, match="bf16 can't be declared; a group holds one of fp8_e4m3_b128, int4_g32"):
        group_declaration({EXPERTS_TARGETS: "bf16"}, [])


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_compressed_tensors_package_reads_our_tensors(name: str) -> None:
    """Under our declaration, decompressed by its own compressor of the group's format. Shape [130, 256]: for FP8 whole
    blocks only, since it knows no others."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    shape = (256, 256) if name == FP8 else (130, 256)
    fmt: QuantFormat = Fp8Block("weight_scale") if name == FP8 else format_named(name)
    parts = fmt.quantize(random_matrix(*shape))
    config = quantization.QuantizationConfig.model_validate(
        group_declaration({EXPERTS_TARGETS: "int4_g32", REST_TARGETS: name}, ["lm_head"])
    )
    scheme = config.config_groups["group_1"]
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    theirs = compressor.decompress(dict(parts), scheme)["weight"]
    ours = fmt.dequantize(parts, shape)
    assert torch.equal(theirs.float(), ours.to(theirs.dtype).float())
    if name == FP8:
        return
    compressed = compressor.compress({"weight": ours, "weight_scale": parts["weight_scale"]}, scheme)
    assert torch.equal(compressed["weight_packed"], parts["weight_packed"])
    assert compressed["weight_scale"].dtype == parts["weight_scale"].dtype
    assert compressed["weight_shape"].tolist() == parts["weight_shape"].tolist()


CONFIG = tiny_config(
    num_hidden_layers=2,
    n_routed_experts=4,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=128,
    q_lora_rank=128,
    kv_lora_rank=128,
    v_head_dim=32,
)
WEIGHTS = random_weights(CONFIG, seed=6)
SCHEMA = schema_of(WEIGHTS, hidden=128, width=128)


def write(folder: Path, experts: str, rest: str) -> tuple[Weights, QuantizationConfig | None]:
    """A folder in the two formats, and the values that it then holds. All rows have 128 columns or a multiple, so that
    a group of 128 and a whole row look alike in many of them."""
    raw = declaration(experts, rest)
    declared = None if raw is None else parse(raw)
    fp8 = Fp8Block(declared.fp8_scale_suffix if declared else "weight_scale_inv")
    stored: Weights = {}
    values: Weights = {}
    for name, weight in WEIGHTS.items():
        module = name.removesuffix(".weight")
        linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
        chosen = (experts if ".mlp.experts." in name else rest) if linear else "f32"
        fmt = fp8 if chosen == FP8 else format_named(chosen)
        parts = fmt.quantize(weight)
        stored |= {f"{module}.{suffix}" if linear else name: part for suffix, part in parts.items()}
        values[name] = fmt.dequantize(parts, tuple(weight.shape))
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    return values, declared


@pytest.mark.parametrize(
    ("experts", "rest"),
    [
        ("int4_g32", "int8_g128"),
        ("int4_g32", "int8_channel"),
        ("int4_g128", "int8_channel"),
        ("int8_channel", "int8_g128"),
        ("int4_g32", FP8),
        (FP8, "int8_channel"),
        ("int8_g128", "bf16"),
        ("bf16", "int8_channel"),
        (FP8, "bf16"),
        (FP8, FP8),
        ("bf16", "bf16"),
    ],
)
def test_a_folder_opens_and_holds_what_was_written(tmp_path: Path, experts: str, rest: str) -> None:
    values, declared = write(tmp_path / "model", experts, rest)
    checkpoint = Checkpoint.open(tmp_path / "model", SCHEMA, declared)
    assert (checkpoint.problems, checkpoint.notes) == ((), ())
    formats = {kind: set(uses) for kind, uses in checkpoint.formats().items()}
    assert formats["routed experts"] == {experts}
    assert formats["attention"] == formats["dense mlp"] == formats["shared experts"] == {rest}
    for name in SCHEMA.trunk:
        assert torch.equal(checkpoint.trunk(name).dequantize(), values[name]), name
    for expert in range(4):
        layout = checkpoint.expert(ExpertKey(1, expert))
        for projection, tensor in zip(PROJECTIONS, expert_weights(layout, read_extents(layout)), strict=True):
            assert torch.equal(tensor.dequantize(), values[f"model.layers.1.mlp.experts.{expert}.{projection}.weight"])


def test_fp8_under_its_own_name_of_the_scale_is_refused_in_a_mixed_folder(tmp_path: Path) -> None:
    write(tmp_path / "model", FP8, FP8)
    mixed = parse(declaration("int4_g32", FP8) or {})
    problems = Checkpoint.open(tmp_path / "model", SCHEMA, mixed).problems
    assert any(
        "q_a_proj.weight_scale_inv must be named weight_scale with quant_method 'compressed-tensors'" in problem
        for problem in problems
    )
    assert any("experts.0.up_proj is stored as fp8_e4m3_b128, which" in problem for problem in problems)


def test_a_row_of_one_group_is_what_the_declaration_says(tmp_path: Path) -> None:
    """128 columns in 8 bits: a group of 128 and a whole row are the same bytes, and either name is right."""
    write(tmp_path / "model", "int4_g32", "int8_channel")
    grouped = parse(declaration("int4_g32", "int8_g128") or {})
    (problem,) = Checkpoint.open(tmp_path / "model", SCHEMA, grouped).problems
    # the only weight with rows of 256 columns
    assert "model.layers.0.mlp.down_proj is stored as int8_channel, which config.json's" in problem
