"""The router's choice against DeepSeek-V3's section 2.1.2 in plain Python; ties and negative scores included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.backends.base import RoutingRule, route
from tests.samples import examples

# (experts, experts a token, groups, groups kept); 12 and 48 are no powers of two, as K2's 384 is none
SHAPES = [(8, 3, 1, 1), (12, 5, 1, 1), (48, 6, 1, 1), (16, 4, 4, 2), (12, 4, 3, 2), (12, 4, 6, 2), (8, 8, 1, 1)]


def choice(logits: list[float], bias: list[float], rule: RoutingRule) -> tuple[list[int], list[float]]:
    """Ids ascending and weights, in Python's own floats."""
    scores = [1 / (1 + math.exp(-value)) for value in logits]
    biased = [score + extra for score, extra in zip(scores, bias, strict=True)]
    size = len(logits) // rule.n_group
    groups = [list(range(at, at + size)) for at in range(0, len(logits), size)]

    def strength(group: list[int]) -> float:
        return sum(sorted((biased[e] for e in group), reverse=True)[:2])

    kept = sorted(groups, key=lambda group: (-strength(group), group[0]))[: rule.topk_group]
    allowed = [expert for group in kept for expert in group]
    ids = sorted(sorted(allowed, key=lambda e: (-biased[e], e))[: rule.num_experts_per_tok])
    total = sum(scores[e] for e in ids) + 1e-20 if rule.norm_topk_prob else 1.0
    return ids, [scores[e] / total * rule.routed_scaling_factor for e in ids]


@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32),
    offset=st.sampled_from([0.0, -3.0, 0.5]),
    normalize=st.booleans(),
)
@settings(max_examples=examples(200), deadline=None)
def test_choice_and_weights(shape: tuple[int, int, int, int], seed: int, offset: float, normalize: bool) -> None:
    """A bias of -3 makes every biased score negative: a masked group must still lose to it."""
    experts, active, groups, kept = shape
    rule = RoutingRule(active, groups, kept, normalize, 2.5)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(experts, generator=generator)
    bias = 0.3 * torch.randn(experts, generator=generator) + offset
    ids, weights = route(logits, bias, rule)
    expected_ids, expected = choice(logits.tolist(), bias.tolist(), rule)
    assert ids.tolist() == expected_ids
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32))
@settings(max_examples=examples(100), deadline=None)
def test_many_equal_scores(shape: tuple[int, int, int, int], seed: int) -> None:
    """Two values only, so that experts and groups tie all the time."""
    experts, active, groups, kept = shape
    rule = RoutingRule(active, groups, kept, True, 1.0)
    logits = torch.randint(0, 2, (experts,), generator=torch.Generator().manual_seed(seed)).float()
    ids, _ = route(logits, torch.zeros(experts), rule)
    assert ids.tolist() == choice(logits.tolist(), [0.0] * experts, rule)[0]


@pytest.mark.parametrize("groups", [1, 4])
def test_equal_scores_go_to_the_lowest_ids(groups: int) -> None:
    rule = RoutingRule(3, groups, 1 if groups == 1 else 2, True, 1.0)
    ids, weights = route(torch.zeros(400), torch.zeros(400), rule)
    assert ids.tolist() == [0, 1, 2]
    assert weights.tolist() == pytest.approx([1 / 3] * 3)
    # the best expert is in the last group; the other places go to the lowest of the equal ones
    logits = torch.zeros(400)
    logits[399] = 1.0
    assert route(logits, torch.zeros(400), rule)[0].tolist() == [0, 1, 399]


def test_scores_that_vanish_give_weights_of_zero_and_no_nan() -> None:
    rule = RoutingRule(2, 1, 1, True, 2.827)
    assert route(torch.full((4,), -200.0), torch.zeros(4), rule)[1].tolist() == [0.0, 0.0]
