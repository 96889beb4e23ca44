"""What a backend can't multiply is refused with a recipe, and the recipe that is named is one that works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from k2lite.backend_check import demand_multipliable, demand_recipe, recipe_for
from k2lite.backends.base import Capabilities
from k2lite.cli import build_parser
from k2lite.demo_checkpoint import DEMO_CONFIG, write_random_demo, write_random_model
from k2lite.errors import BackendError
from k2lite.model_folder import open_model
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.quantization_plan import plan_quantization
from k2lite.quant.recipe import default_recipe
from k2lite.verbs.quantize import _formats, _recipe

PLAIN = {"bf16", "f32"}
TINY = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "hidden_size": 128, "q_lora_rank": 128}


def table(*formats: str, experts: set[str] | None = None, most: int | None = None) -> Capabilities:
    taken = frozenset({*PLAIN, *formats})
    return Capabilities(taken, "x", expert_formats=None if experts is None else frozenset(experts), max_experts=most)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """FP8 throughout; q_lora_rank 96 keeps int8_g128 out of its trunk."""
    folder = tmp_path_factory.mktemp("check") / "model"
    write_random_demo(folder)
    return open_model(folder)[1]


@pytest.mark.parametrize(
    ("can", "options"),
    [
        (table("int4_g32", "int8_channel"), "--experts int4_g32 --trunk int8_channel"),
        (table("int8_g128", "int8_channel", "int4_g64"), "--experts int4_g64 --trunk int8_channel"),
        (table("fp8_e4m3_b128", experts={"int8_channel"}), "--experts int8_channel --trunk keep"),
        (table(experts={"fp8_e4m3_b128"}), "--trunk bf16 --experts keep"),
        (table(), "--experts bf16 --trunk bf16"),
    ],
)
def test_the_recipe_that_is_named_works(demo: Checkpoint, can: Capabilities, options: str) -> None:
    with pytest.raises(BackendError, match=r"backend x can't multiply fp8_e4m3_b128; it takes ") as caught:
        demand_multipliable(demo, "x", can)
    command = re.search(r"k2lite (quantize \S+ DST .*) makes a folder that it takes", str(caught.value))
    assert command is not None
    assert command[1].endswith(options)
    args = build_parser().parse_args(shlex.split(command[1]))
    plan = plan_quantization(demo, _recipe(args, demo, None))
    demand_recipe(_formats(plan), "x", can)


def test_what_no_recipe_helps_is_said(demo: Checkpoint) -> None:
    with pytest.raises(BackendError, match="no recipe helps, since (embeddings|router) are kept"):
        demand_multipliable(demo, "x", Capabilities(frozenset({"int4_g32", "f32"}), "x"))
    with pytest.raises(BackendError, match="no recipe of k2lite quantize makes a folder that it takes"):
        demand_multipliable(demo, "x", table(experts={"f16"}))


def test_too_many_experts_are_refused_with_both_numbers(demo: Checkpoint) -> None:
    with pytest.raises(BackendError, match="backend x takes at most 40 experts a layer, and this model has 48"):
        demand_multipliable(demo, "x", table("fp8_e4m3_b128", most=40))


def test_defaults_change_only_where_the_backend_lacks_them(demo: Checkpoint) -> None:
    usual = default_recipe({"fp8_e4m3_b128"})
    assert recipe_for(demo, usual, "x", table("int4_g32", "fp8_e4m3_b128")) == usual
    other = recipe_for(demo, usual, "x", table("int4_g64", "fp8_e4m3_b128"))
    assert (other.experts, other.trunk, other.lm_head) == ("int4_g64", "keep", "keep")
    with pytest.raises(BackendError, match="no recipe makes a folder"):
        recipe_for(demo, usual, "x", table(experts=set()))


def test_a_choice_that_the_backend_lacks_is_refused_by_option() -> None:
    can = table("int8_channel", experts={"int4_g64"})
    demand_recipe({"experts": {"int4_g64"}, "trunk": {"int8_channel", "bf16"}, "kept": {"f32"}}, "x", can)
    with pytest.raises(BackendError, match=r"can't multiply int4_g32 \(experts\); --experts must be one of int4_g64"):
        demand_recipe({"experts": {"int4_g32"}}, "x", can)
    with pytest.raises(BackendError, match=r"\(lm_head\); --lm-head must be one of bf16"):
        demand_recipe({"lm_head": {"fp8_e4m3_b128"}}, "x", can)


@pytest.mark.parametrize(
    ("experts", "trunk"),
    [("int4_g32", "bf16"), ("int8_g128", "int8_channel"), ("bf16", "bf16"), ("int4_g128", "fp8_e4m3_b128")],
)
def test_random_models_open_in_any_formats(tmp_path: Path, experts: str, trunk: str) -> None:
    """The conformance suite's models are what their config declares."""
    write_random_model(tmp_path / "model", {**DEMO_CONFIG, **TINY}, experts=experts, trunk=trunk, seed=1)
    checkpoint = open_model(tmp_path / "model")[1]
    checkpoint.raise_for_problems()
    formats = checkpoint.formats()
    assert set(formats["routed experts"]) == {experts}
    assert set(formats["attention"]) == {trunk}
