"""`k2lite quantize` as a user types it: the plan first, one line for a mistake, a folder that runs."""

from __future__ import annotations

import json
from pathlib import Path

import k2lite
from k2lite.model_folder import open_model
from k2lite.quant.recipe import TARGETS
from k2lite.verbs import quantize
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

from .conftest import Run


def test_the_plan_comes_first_and_the_result_runs(k2: Run, demo: Path, tmp_path: Path) -> None:
    dry = k2("quantize", demo, tmp_path / "out", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "out").exists()
    assert "experts      432 x  fp8_e4m3_b128 -> int4_g32" in dry.stderr
    plan = json.loads(dry.stdout)
    assert "limited by the" in dry.stderr
    assert plan["time"]["seconds"] == max(plan["time"]["read_s"] + plan["time"]["write_s"], plan["time"]["compute_s"])
    assert not list(tmp_path.iterdir())
    result = k2("quantize", demo, tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["table"] == plan["table"]
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    formats = open_model(tmp_path / "out")[1].formats()
    assert set(formats["routed experts"]) == {"int4_g32"}
    assert set(formats["attention"]) == {"fp8_e4m3_b128"}
    assert k2lite.load(tmp_path / "out").logits([1, 2, 3]).isfinite().all()
    again = k2("quantize", demo, tmp_path / "out")
    assert again.returncode == 2
    assert "is finished already" in again.stderr


def test_the_targets_that_are_named_are_written(k2: Run, demo: Path, tmp_path: Path) -> None:
    # the demo's rows of 192 columns hold no group of 128
    refused = k2("quantize", demo, tmp_path / "no", "--trunk", "int8_g128")
    assert refused.returncode == 2
    assert "int8_g128 needs rows of a multiple of 128 columns, found 192" in refused.stderr
    chosen = ("--experts", "int4_g64", "--trunk", "int8_channel", "--lm-head", "int8_channel", "--scale-search", "mse")
    rule = ("--rule", r"re:.*layers\.1\..*kv_b_proj=keep", "--rule", r"re:.*layers\.0\..*kv_b_proj=bf16")
    result = k2("quantize", demo, tmp_path / "out", *chosen, *rule)
    assert result.returncode == 0, result.stderr
    _, checkpoint = open_model(tmp_path / "out")
    assert checkpoint.problems == ()
    assert set(checkpoint.formats()["head"]) == {"int8_channel"}
    assert checkpoint.trunk("model.layers.0.self_attn.kv_b_proj.weight").format.name == "bf16"
    assert checkpoint.trunk("model.layers.1.self_attn.kv_b_proj.weight").format.name == "fp8_e4m3_b128"
    assert checkpoint.trunk("model.layers.2.self_attn.kv_b_proj.weight").format.name == "int8_channel"


def test_the_help_names_every_target() -> None:
    """The verb imports no torch, so it has a list of its own."""
    assert ", ".join(TARGETS) == quantize.FORMATS


def test_an_int4_folder_is_told_that_it_needs_nothing(k2: Run, tmp_path: Path) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path / "int4", config, random_weights(config, seed=1), format="int4")
    result = k2("quantize", tmp_path / "int4")
    assert (result.returncode, result.stdout) == (0, "")
    assert "are INT4 already; run it as it is, or with --trunk int8_g128 (run, chat" in result.stderr


def test_mistakes_are_one_line(k2: Run, demo: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([demo], "name a folder to write to"),
        ([demo, demo], "is the source; name another folder"),
        ([tmp_path / "none", tmp_path / "out"], "not a folder"),
        ([demo, tmp_path / "out", "--experts", "q4_0"], "--experts: the format 'q4_0' is unknown"),
        ([demo, tmp_path / "out", "--rule", "x"], "expected PATTERN=FORMAT"),
        ([demo, tmp_path / "out", "--rule", "re:.*gate$=int8_channel"], "which is always kept as it is"),
    ):
        result = k2("quantize", *arguments)
        assert result.returncode == 2, arguments
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
