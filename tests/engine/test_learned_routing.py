"""What earlier runs showed of routing warms the next one up, and is worth less in a new conversation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import k2lite
from k2lite.errors import RequestError
from k2lite.learned_routing import keep_in_file, recall_file
from k2lite.offload.cache import ExpertCache
from k2lite.session import Session
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

IDS = [3, 1, 4, 1, 5, 9]


def cache_of(engine: k2lite.Engine) -> ExpertCache:
    assert isinstance(engine.experts, ExpertCache)
    return engine.experts


def test_a_file_warms_the_next_run_up_and_changes_no_bit(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "routing"
    first = k2lite.load(tiny_folder, context=64, resident_experts=6, statistics=file)  # there is none yet
    expected = first.logits(IDS)
    keep_in_file(first.experts, first.config, file)
    second = k2lite.load(tiny_folder, context=64, resident_experts=6, statistics=file)
    assert cache_of(second).stats.uses.sum() > 0
    assert cache_of(second).stats.counts.sum() == 0, "counts are of this run"
    assert any(np.any(part) for part in cache_of(second).policy.state().values())
    assert torch.equal(second.logits(IDS), expected)
    assert recall_file(second.experts, second.config, tmp_path / "nothing") is False


def test_another_model_s_file_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    first = k2lite.load(tiny_folder, context=64)
    keep_in_file(first.experts, first.config, tmp_path / "routing")
    config = tiny_config(n_routed_experts=12)
    write_checkpoint(tmp_path / "other", config, random_weights(config, seed=0), format="bf16")
    with pytest.raises(RequestError, match="statistics of another model: n_experts is 8, expected 12"):
        k2lite.load(tmp_path / "other", statistics=tmp_path / "routing")


def test_a_new_conversation_discounts_what_the_last_one_showed(tiny_folder: Path) -> None:
    engine = k2lite.load(tiny_folder, context=64)
    session, params = Session(engine), k2lite.SamplingParams(temperature=0)
    stats = cache_of(engine).stats

    def uses_after(ids: list[int]) -> float:
        sequence = session._reuse(ids)
        engine.prefill(sequence, ids[len(sequence.ids) :])
        return float(stats.uses.sum())

    assert params.temperature == 0
    first = uses_after(IDS)
    assert uses_after([*IDS, 7]) > first, "it goes on"
    before = float(stats.uses.sum())
    new = [8, 8, 8, 8]
    per_token = first / len(IDS)
    assert uses_after(new) == pytest.approx(before / 4 + per_token * len(new))
