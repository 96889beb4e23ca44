"""A trunk quantized while loading gives the logits of the folder that `quantize --trunk` writes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.errors import CheckpointError, RequestError
from k2lite.quant.recipe import Recipe
from tests.quant.quantizing import run, write_source

IDS = [3, 150, 7, 7, 21, 90]


@pytest.mark.parametrize(
    ("source", "trunk"),
    [("int4", "int8_g128"), ("bf16", "int4_g32"), ("bf16", "fp8_e4m3_b128"), ("fp8", "int8_channel"), ("fp8", "bf16")],
)
def test_logits_are_those_of_the_written_folder(tmp_path: Path, source: str, trunk: str) -> None:
    write_source(tmp_path / "source", source, num_hidden_layers=2)
    run(tmp_path / "source", tmp_path / "written", Recipe(experts="keep", trunk=trunk, lm_head="keep"))
    on_load = k2lite.load(tmp_path / "source", backend="reference", trunk=trunk)
    written = k2lite.load(tmp_path / "written", backend="reference")
    assert torch.equal(on_load.logits(IDS), written.logits(IDS))
    assert not torch.equal(on_load.logits(IDS), k2lite.load(tmp_path / "source", backend="reference").logits(IDS))
    assert on_load.placement.trunk_bytes == written.placement.trunk_bytes
    assert on_load.placement.arithmetic == f"{written.placement.arithmetic}, trunk to {trunk}"


def test_a_target_that_is_unknown_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", "bf16", num_hidden_layers=2, kv_lora_rank=96)
    with pytest.raises(RequestError, match="--trunk: the format 'int9' is unknown"):
        k2lite.load(tmp_path / "source", trunk="int9")
    with pytest.raises(CheckpointError, match="kv_b_proj .* int8_g128 needs rows of a multiple of 128 columns"):
        k2lite.load(tmp_path / "source", trunk="int8_g128")
