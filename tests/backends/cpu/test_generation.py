"""Whole generations on the CPU backend: a token's logits depend on the tokens before it and on nothing else."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import k2lite
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.engine import Chunk
from k2lite.errors import RequestError
from k2lite.sample_text import SAMPLE_TEXT
from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.samples import examples

IDS = [(7 * i + i * i) % 160 for i in range(41)]
FORMATS = ("int4", "fp8")


@pytest.fixture(scope="session", params=FORMATS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {} if request.param == "int4" else {"hidden_size": 136, "moe_intermediate_size": 130, "kv_lora_rank": 33}
    config = tiny_config(**changes)
    path = tmp_path_factory.mktemp(request.param) / "model"
    write_checkpoint(path, config, random_weights(config, seed=3), format=request.param)
    return path


@pytest.fixture(scope="session")
def engine(folder: Path) -> k2lite.Engine:
    return k2lite.load(folder, backend="cpu", context=256)


def chunked(engine: k2lite.Engine, cuts: list[int]) -> torch.Tensor:
    bounds = [0, *sorted(set(cuts)), len(IDS)]
    with engine.open(len(IDS)) as sequence:
        return torch.cat([engine.step([Chunk(sequence, IDS[a:b], "all")])[0] for a, b in pairwise(bounds) if a < b])


def test_prefill_equals_decode(engine: k2lite.Engine) -> None:
    expected = engine.logits(IDS)
    assert expected.isfinite().all()
    assert torch.equal(chunked(engine, list(range(1, len(IDS)))), expected)


@given(cuts=st.lists(st.integers(1, len(IDS) - 1), max_size=6))
@settings(max_examples=examples(8), deadline=None)
def test_chunks_change_no_bit(engine: k2lite.Engine, cuts: list[int]) -> None:
    assert torch.equal(chunked(engine, cuts), engine.logits(IDS))


def test_neighbours_change_no_bit(engine: k2lite.Engine) -> None:
    prompts = [IDS[:9], IDS[20:21], IDS[3:30]]
    alone = [engine.logits(ids) for ids in prompts]
    together = engine.step([Chunk(engine.open(32), ids, "all") for ids in reversed(prompts)])
    for found, expected in zip(reversed(together), alone, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(engine: k2lite.Engine, folder: Path, threads: int) -> None:
    other = k2lite.load(folder, backend="cpu", context=256, threads=threads)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(other.logits(IDS), engine.logits(IDS))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spare", [1, 3, 9])
def test_experts_on_the_drive_change_no_bit(engine: k2lite.Engine, folder: Path, spare: int) -> None:
    slots = engine.config.num_experts_per_tok + spare
    other = k2lite.load(folder, backend="cpu", context=256, resident_experts=slots)
    assert other.placement.slots == slots < other.placement.experts
    assert torch.equal(other.logits(IDS), engine.logits(IDS))
    assert torch.equal(chunked(other, list(range(1, len(IDS)))), engine.logits(IDS))


TRUNK = "int8_channel"  # the demo as shipped has no integer weights, whose inputs alone are rounded


@pytest.fixture(scope="session")
def theirs() -> torch.Tensor:
    """The reference backend's log-probabilities for the sample text."""
    engine = k2lite.load(DEMO_FOLDER, backend="reference", context=64, trunk=TRUNK)
    return torch.log_softmax(engine.logits(engine.tokenizer.encode(SAMPLE_TEXT)[:64]).double(), dim=-1)


@pytest.mark.parametrize(("activations", "bar"), [("int8", 0.002), ("bf16", 0.001)])
def test_the_demo_is_as_near_to_the_reference_as_promised(theirs: torch.Tensor, activations: str, bar: float) -> None:
    """KL per token at most 0.002 with int8 activations."""
    with k2lite.load(DEMO_FOLDER, backend="cpu", context=64, trunk=TRUNK, activations=activations) as engine:
        ours = torch.log_softmax(engine.logits(engine.tokenizer.encode(SAMPLE_TEXT)[:64]).double(), dim=-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    assert 1e-6 < divergence.mean() <= bar


def test_options_of_another_backend_are_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="activations has no effect with backend 'reference'"):
        k2lite.load(folder, backend="reference", activations="bf16")
    with pytest.raises(RequestError, match="activations is 'int3'; known: int8, bf16"):
        k2lite.load(folder, activations="int3")
    assert "bf16 activations" in k2lite.load(folder, activations="bf16").placement.arithmetic
