"""Which format a weight gets: defaults, rules before kinds, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.formats import format_named
from k2lite.quant.quantization_config import parse_quantization_config
from k2lite.quant.quantized_config import plan_declaration
from k2lite.quant.recipe import Recipe, Rule, default_recipe, parse_rule
from tests.quant.quantizing import make_plan, write_source

BF16 = format_named("bf16")


def test_defaults_follow_the_source() -> None:
    assert default_recipe({"fp8_e4m3_b128"}) == Recipe("int4_g32", "keep", "keep")
    assert default_recipe({"bf16"}) == Recipe("int4_g32", "int8_g128", "keep")
    assert default_recipe({"int4_g32"}) == Recipe("keep", "int8_g128", "keep")


def test_the_first_rule_that_matches_comes_before_the_kind() -> None:
    rules = (Rule(r"re:.*layers\.1\..*", "int8_channel"), Rule(r".*q_b_proj", "keep"))
    recipe = Recipe("int4_g32", "int8_g128", "keep", rules)
    target = recipe.target
    assert target("model.layers.1.self_attn.q_b_proj", "trunk", BF16).name == "int8_channel"
    assert target("model.layers.2.self_attn.q_b_proj", "trunk", BF16) is BF16
    assert target("model.layers.2.self_attn.o_proj", "trunk", BF16).name == "int8_g128"
    assert target("lm_head", "lm_head", BF16) is BF16
    assert target("model.norm", "kept", BF16) is BF16
    with pytest.raises(RequestError, match=r"matches model\.layers\.1\.mlp\.gate, which is always kept"):
        target("model.layers.1.mlp.gate", "kept", BF16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("int3", "keep", "keep"), "--experts: the format 'int3' is unknown; known: int4_g32"),
        (lambda: Recipe("keep", "q4_0", "keep"), "--trunk: the format 'q4_0'"),
        (lambda: Recipe("keep", "keep", "int4"), "--lm-head: the format 'int4'"),
        (lambda: Recipe("keep", "keep", "keep", (Rule("(", "keep"),)), r"--rule \(: not a regular expression"),
        (lambda: Recipe("keep", "keep", "keep", (Rule("a", "b"),)), "--rule a: the format 'b'"),
        (lambda: parse_rule("nothing"), "expected PATTERN=FORMAT"),
    ],
)
def test_mistakes_are_named(make: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()  # type: ignore[operator]


def test_a_group_longer_than_a_row_is_refused_by_name(tmp_path: Path) -> None:
    write_source(tmp_path / "source", "bf16", moe_intermediate_size=64)
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.down_proj \[256, 64\]: int4_g128 needs rows of a multiple of 128"
    ):
        make_plan(tmp_path / "source", Recipe("int4_g128", "keep", "keep"))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("int4_g32", "int8_g128", "keep"),
        Recipe("int4_g32", "int8_g128", "int8_g128"),
        Recipe("int4_g64", "keep", "int8_channel"),
        Recipe("keep", "int8_channel", "keep"),
        Recipe("fp8_e4m3_b128", "fp8_e4m3_b128", "keep"),
        Recipe("int4_g32", "fp8_e4m3_b128", "keep"),
        Recipe("int4_g32", "int8_g128", "keep", (Rule(r"re:.*layers\.2\.mlp\.experts\..*", "int4_g128"),)),
        Recipe("int4_g32", "int8_g128", "keep", (Rule(r"re:.*kv_b_proj", "keep"),)),
        Recipe("int4_g32", "int8_g128", "keep", (Rule(r"re:.*kv_b_proj", "int8_channel"),)),
    ],
)
def test_what_is_declared_is_what_is_planned(tmp_path: Path, recipe: Recipe) -> None:
    write_source(tmp_path / "source", "bf16")
    plan = make_plan(tmp_path / "source", recipe)
    declared = parse_quantization_config(plan_declaration(plan), Path("config.json"))
    assert declared is not None
    for matrix in plan.matrices:
        if matrix.target.name not in ("bf16", "f32", "f16") and declared.method != "fp8":
            assert declared.format_of(matrix.module) == matrix.target.name, matrix.module
        elif matrix.kind in ("trunk", "experts", "lm_head") and declared.method != "fp8":
            # other readers would look for packed weights there
            assert declared.format_of(matrix.module) is None, matrix.module
