"""A recorded trace is what the routers chose, whatever the chunks and the context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import k2lite
from k2lite.engine import Chunk
from k2lite.errors import RequestError
from k2lite.offload.routing_trace import TracedModel
from k2lite.routing_recording import record_routing

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 64, 11)]


def traced(engine: k2lite.Engine) -> TracedModel:
    return TracedModel("tiny", "kimi_k2", engine.config.moe_layers, engine.config.n_routed_experts)


def heard(engine: k2lite.Engine, ids: list[int]) -> dict[int, np.ndarray]:
    """The choices of each layer, token by token, as the source hears them."""
    choices: dict[int, list[torch.Tensor]] = {layer: [] for layer in engine.config.moe_layers}

    def hear(layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        assert ids.shape == weights.shape
        choices[layer].append(ids)

    engine.experts.observers = (hear,)
    with engine.open(len(ids)) as sequence:
        for token in ids:
            engine.step([Chunk(sequence, [token])])
    engine.experts.observers = ()
    return {layer: torch.cat(parts).numpy() for layer, parts in choices.items()}


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_trace_is_what_the_routers_chose(
    engine: k2lite.Engine, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "placement", replace(engine.placement, prefill_chunk_tokens=chunk))
    counted = engine.experts.stats.counts.copy()
    done: list[int] = []
    trace = record_routing(engine, IDS, traced(engine), done.append)
    assert done[-1] == len(IDS)
    assert trace.weights is not None
    scale = trace.weights.astype(np.float64).sum(axis=2)
    np.testing.assert_allclose(scale, engine.config.routed_scaling_factor, rtol=2e-3)
    counted = engine.experts.stats.counts - counted
    for row, (layer, choices) in enumerate(heard(engine, IDS).items()):
        np.testing.assert_array_equal(trace.ids[:, row], choices, err_msg=str(layer))
        expected = np.bincount(choices.ravel(), minlength=engine.config.n_routed_experts)
        np.testing.assert_array_equal(counted[row], expected)
    assert engine.experts.observers == ()


def test_a_text_longer_than_the_context_is_read_in_windows(tiny_folder: Path) -> None:
    engine = k2lite.load(tiny_folder, backend="reference", context=4)
    trace = record_routing(engine, IDS, traced(engine))
    assert len(trace.ids) == len(IDS)
    for start in (0, 4, 8):
        alone = record_routing(engine, IDS[start : start + 4], traced(engine))
        np.testing.assert_array_equal(trace.ids[start : start + 4], alone.ids)


def test_nothing_to_read_and_no_listener_left_after_a_failure(engine: k2lite.Engine) -> None:
    with pytest.raises(RequestError, match="no tokens"):
        record_routing(engine, [], traced(engine))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        record_routing(engine, [1, 10**6], traced(engine))

    def fail(done: int) -> None:
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt):
        record_routing(engine, IDS, traced(engine), fail)
    assert engine.experts.observers == ()
