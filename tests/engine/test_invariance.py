"""A token's bits depend on the tokens before it and on nothing else: not on chunks, batch, threads or arrival order."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

import k2lite
from k2lite.backends.reference import ReferenceBackend
from k2lite.engine import Chunk
from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.samples import examples

IDS = [(7 * i + i * i) % 160 for i in range(41)]


def chunked(engine: k2lite.Engine, ids: list[int], cuts: list[int]) -> torch.Tensor:
    bounds = [0, *sorted(set(cuts)), len(ids)]
    with engine.open(len(ids)) as sequence:
        parts = [engine.step([Chunk(sequence, ids[a:b], "all")])[0] for a, b in pairwise(bounds) if a < b]
    return torch.cat(parts)


def test_prefill_equals_decode_bit_for_bit(engine: k2lite.Engine) -> None:
    assert torch.equal(engine.logits(IDS), chunked(engine, IDS, list(range(1, len(IDS)))))


@given(cuts=st.lists(st.integers(1, len(IDS) - 1), max_size=6))
@settings(max_examples=examples(15), deadline=None)
def test_any_chunking_equals_one_chunk_bit_for_bit(engine: k2lite.Engine, cuts: list[int]) -> None:
    assert torch.equal(engine.logits(IDS), chunked(engine, IDS, cuts))


@given(
    prompts=st.lists(st.lists(st.integers(0, 159), min_size=1, max_size=12), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=examples(15), deadline=None)
def test_a_sequence_does_not_see_its_neighbours(engine: k2lite.Engine, prompts: list[list[int]], order: object) -> None:
    alone = [engine.logits(ids) for ids in prompts]
    indices = list(range(len(prompts)))
    order.shuffle(indices)  # type: ignore[attr-defined]
    sequences = [engine.open(32) for _ in prompts]
    together = engine.step([Chunk(sequences[i], prompts[i], "all") for i in indices])
    for place, i in enumerate(indices):
        assert torch.equal(together[place], alone[i])
    # and on: one more token each, in one ragged step
    follow = engine.step([Chunk(sequences[i], [5]) for i in indices])
    for place, i in enumerate(indices):
        assert torch.equal(follow[place][0], engine.logits([*prompts[i], 5])[-1])


def test_thread_count_changes_no_bit(engine: k2lite.Engine) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(engine.logits(IDS))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture(scope="module", params=["absorbed", "naive"])
def other_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> k2lite.Engine:
    """Other widths, edge blocks of FP8, YaRN and groups; both ways to write attention."""
    yarn = {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    groups = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4}
    config = tiny_config(hidden_size=136, moe_intermediate_size=130, kv_lora_rank=33, rope_scaling=yarn, **groups)
    folder = tmp_path_factory.mktemp("other") / "model"
    write_checkpoint(folder, config, random_weights(config, seed=6), format="fp8")
    return k2lite.load(folder, backend=ReferenceBackend(mla=request.param), context=64)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 16, 40])
def test_prefill_in_chunks_of_any_size_in_either_form(other_engine: k2lite.Engine, chunk_tokens: int) -> None:
    expected = other_engine.logits(IDS)
    with other_engine.open(64) as sequence:
        assert torch.equal(other_engine.prefill(sequence, IDS, chunk_tokens=chunk_tokens), expected[-1])
    assert torch.equal(chunked(other_engine, IDS, list(range(chunk_tokens, len(IDS), chunk_tokens))), expected)


def test_truncating_and_going_on_equals_a_fresh_start(engine: k2lite.Engine) -> None:
    with engine.open(64) as sequence:
        engine.prefill(sequence, IDS[:30])
        sequence.truncate(11)
        logits = engine.prefill(sequence, IDS[11:25])
        assert sequence.ids == IDS[:25]
    assert torch.equal(logits, engine.logits(IDS[:25])[-1])
