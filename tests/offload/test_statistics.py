"""Router statistics and guesses against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from k2lite.offload.predictor import Predictor
from k2lite.offload.routing_analysis import analyse
from k2lite.offload.routing_trace import read_trace
from k2lite.offload.statistics import RouterStats
from tests.conftest import SHARED
from tools.synthetic_routing import synthetic_routing

N_TOKENS, N_LAYERS, N_EXPERTS, ACTIVE = 24, 3, 8, 2
IDS = synthetic_routing(N_TOKENS, N_LAYERS, N_EXPERTS, ACTIVE, seed=3).astype(np.int64)


def observed(chunks: list[int], ids: npt.NDArray[np.int64] = IDS, layers: tuple[int, ...] = (1, 2, 3)) -> RouterStats:
    """Statistics of ids that came in chunks of so many tokens."""
    stats = RouterStats(layers, N_EXPERTS)
    at = 0
    for size in chunks:
        for row, layer in enumerate(layers):
            part = torch.from_numpy(ids[at : at + size, row])
            stats.observe(layer, part, torch.ones(part.shape))
        at += size
    return stats


@pytest.mark.parametrize("chunks", [[1] * N_TOKENS, [N_TOKENS], [5, 1, 1, 17]])
def test_counts_are_those_of_plain_loops_whatever_the_chunks(chunks: list[int]) -> None:
    stats = observed(chunks)
    for row in range(N_LAYERS):
        for expert in range(N_EXPERTS):
            ages = [N_TOKENS - 1 - t for t in range(N_TOKENS) if expert in IDS[t, row]]
            assert stats.counts[row, expert] == stats.weight_sums[row, expert] == len(ages)
            for index, half_life in enumerate((3, 32)):
                expected = math.fsum(0.5 ** (age / half_life) for age in ages)
                assert stats.recent[row, index, expert] == pytest.approx(expected, rel=1e-12)
            for other in range(N_EXPERTS) if row else ():
                both = sum(other in IDS[t, row - 1] and expert in IDS[t, row] for t in range(N_TOKENS))
                assert stats.follows[row - 1, other, expert] == both
    assert stats.counts.sum() == IDS.size
    assert stats.follows.sum() == N_TOKENS * (N_LAYERS - 1) * ACTIVE**2


def test_layers_of_different_batches_are_not_paired() -> None:
    stats = RouterStats((0, 1), 4)
    stats.observe(0, torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2))
    stats.observe(1, torch.tensor([[0, 1]]), torch.ones(1, 2))
    stats.observe(1, torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert stats.follows.sum() == 0


def test_reuse_and_lift_are_their_formulas() -> None:
    stats = observed([N_TOKENS])
    for row in range(N_LAYERS):
        rates = [stats.recent[row, i] * (1 - 0.5 ** (1 / h)) for i, h in enumerate((3, 32))]
        np.testing.assert_allclose(stats.reuse(row), sum(rates) / 2 + 0.1 * ACTIVE / N_EXPERTS)
    before, after = stats.counts[0], stats.counts[1]
    for expert in range(N_EXPERTS):
        mean = (after[expert] + 0.5) / (after.sum() + 0.5 * N_EXPERTS) * ACTIVE
        logs = [math.log((stats.follows[0, i, expert] + 4 * mean) / (before[i] + 4) / mean) for i in (2, 5)]
        assert stats.lift(1, [2, 5])[expert] == pytest.approx(math.exp(sum(logs) / 2))


def test_saved_statistics_keep_their_proportions_and_lose_weight() -> None:
    old, new = observed([N_TOKENS]), RouterStats((1, 2, 3), N_EXPERTS)
    new.restore(old.state())
    np.testing.assert_allclose(new.follows, old.follows / 4)
    np.testing.assert_allclose(new.uses, old.counts / 4)
    assert not new.counts.any()
    assert not new.recent[:, 0].any()
    np.testing.assert_allclose(new.recent[:, 1], old.recent[:, 1] / 4)
    with pytest.raises(ValueError, match="shape"):
        RouterStats((1, 2), N_EXPERTS).restore(old.state())


def test_guesses_follow_the_router_then_the_statistics() -> None:
    predictor = Predictor(observed([N_TOKENS]))
    likely = predictor.stats.reuse(1) * predictor.stats.lift(1, [2, 5])
    by_statistics = sorted(range(N_EXPERTS), key=lambda e: (-likely[e], e))
    assert predictor.rank(1, [2, 5], None, limit=5) == by_statistics[:5]
    assert predictor.rank(0, None, None, limit=3) == np.argsort(-predictor.stats.reuse(0), kind="stable")[:3].tolist()
    assert predictor.rank(1, [2, 5], [7, 0, 3], limit=3) == [7, 0, 3]
    rest = [expert for expert in by_statistics if expert not in (7, 0, 3)]
    assert predictor.rank(1, [2, 5], [7, 0, 3]) == [7, 0, 3, *rest]
    guesses = predictor.guesses(1, [2, 5], [7, 0, 3])
    chances = [chance for _, chance in guesses]
    assert chances == sorted(chances, reverse=True)
    assert all(0 <= chance <= 1 for chance in chances)
    assert guesses[0][1] == pytest.approx(0.92)


def test_before_anything_was_seen_all_are_alike_and_the_lowest_id_leads() -> None:
    assert Predictor(RouterStats((1, 2), 5)).rank(1, [3], None) == [0, 1, 2, 3, 4]


def test_the_router_s_precision_is_learned_by_rank() -> None:
    """A router whose first rank is always wrong and whose second is always right."""
    predictor = Predictor(RouterStats((0, 1), 8))
    for _ in range(400):
        predictor.rank(1, None, [6, 7])
        predictor.observe(1, [1, 7])
    assert predictor.precision[0] < 0.1
    assert predictor.precision[1] > 0.95
    assert predictor.rank(1, None, [3, 2])[0] == 2
    other = Predictor(RouterStats((0, 1), 8))
    other.restore(predictor.state())
    np.testing.assert_array_equal(other.precision, predictor.precision)
    predictor.observe(0, [1, 2])  # nothing was guessed for it
    before = predictor.precision.copy()
    predictor.observe(1, [3, 2])
    predictor.observe(1, [3, 2])  # counted once
    assert predictor.precision[0] > before[0]


def test_guesses_from_statistics_alone_find_half_of_the_next_layer(shared: object) -> None:
    """Kimi-Linear, the second half of 100 tokens: the token before finds a third."""
    assert shared
    trace = read_trace(SHARED / "traces/kimi-linear_olmoe/trace_kimi_300.jsonl")
    ids = trace.ids[:100].astype(np.int64)
    stats = RouterStats(trace.model.layers, trace.model.n_experts)
    predictor = Predictor(stats)
    found = repeated = 0
    for token in range(100):
        for layer in range(ids.shape[1]):
            if token >= 50 and layer:
                guess = predictor.rank(layer, ids[token, layer - 1].tolist(), None, limit=8)
                found += len(np.intersect1d(guess, ids[token, layer]))
                repeated += len(np.intersect1d(ids[token - 1, layer], ids[token, layer]))
            stats.observe(layer, torch.from_numpy(ids[token : token + 1, layer]), torch.ones(1, 8))
    judged = 50 * 25 * 8
    assert found / judged > 0.45 > 0.38 > repeated / judged


def test_facts_of_a_trace_by_plain_loops() -> None:
    facts = analyse(IDS.astype(np.uint16), N_EXPERTS)
    for row in range(N_LAYERS):
        uses = sorted((sum(e in IDS[t, row] for t in range(N_TOKENS)) for e in range(N_EXPERTS)), reverse=True)
        total = N_TOKENS * ACTIVE
        assert sorted(facts.counts[row], reverse=True) == uses
        assert facts.distinct[row] == sum(use > 0 for use in uses)
        assert facts.entropy_bits[row] == pytest.approx(-sum(u / total * math.log2(u / total) for u in uses if u))
        assert facts.top_shares[0.25][row] == pytest.approx(sum(uses[:2]) / total)
        for lag in (1, 4, 16):
            both = [len(set(IDS[t, row]) & set(IDS[t - lag, row])) for t in range(lag, N_TOKENS)]
            assert facts.reuse[lag][row] == pytest.approx(np.mean(both) / ACTIVE)
    assert 64 not in facts.reuse
    for row in range(1, N_LAYERS):
        both = [len(set(IDS[t, row]) & set(IDS[t - 1, row])) for t in range(12, N_TOKENS)]
        assert facts.by_previous_token[row - 1] == pytest.approx(np.mean(both) / ACTIVE)


def test_facts_of_the_published_traces_are_those_on_file(shared: object) -> None:
    """routing.md 1.3, to the digits it gives; the recall from the layer before is at least that of co-occurrence."""
    assert shared
    rows = {
        "kimi_300": ([0.533, 0.765, 0.942], [0.34, 0.27, 0.23, 0.18, 0.17, 0.16], (0.34, 0.29, 0.46), 196),
        "olmoe_299": ([0.313, 0.554, 0.803], [0.44, 0.35, 0.31, 0.30, 0.30, 0.24], (0.47, 0.29, 0.52), 61),
    }
    for name, (top, reuse, recall, distinct) in rows.items():
        trace = read_trace(SHARED / f"traces/kimi-linear_olmoe/trace_{name}.jsonl")
        facts = analyse(trace.ids, trace.model.n_experts)
        np.testing.assert_allclose([v.mean() for v in facts.top_shares.values()], top, atol=0.0006)
        np.testing.assert_allclose([v.mean() for v in facts.reuse.values()], reuse, atol=0.006)
        assert facts.by_previous_token.mean() == pytest.approx(recall[0], abs=0.006)
        assert facts.by_popularity.mean() == pytest.approx(recall[1], abs=0.006)
        assert facts.by_previous_layer.mean() > recall[2]
        assert facts.distinct.mean() == pytest.approx(distinct, abs=0.6)
