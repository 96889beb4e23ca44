"""Sampling: filters against a float64 brute force, draws against the distribution, and every error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.quant.errors import K2LiteError, RequestError
from k2lite.sampling import SamplingParams, sample, sample_allowed
from tests.samples import examples


def allowed_set(logits: list[float], params: SamplingParams) -> set[int]:
    """Which tokens may come out, from the definitions: written apart, with plain Python numbers."""
    weights = [np.exp((value - max(logits)) / params.temperature) for value in logits]
    shares = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept, mass = [], 0.0
    for rank, token in enumerate(order):
        if params.top_k and rank >= params.top_k:
            break
        if mass >= params.top_p:
            break
        if shares[token] < params.min_p * shares[order[0]]:
            break
        kept.append(token)
        mass += shares[token]
    return set(kept)


@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 5),
    top_p=st.sampled_from([1.0, 0.9, 0.31]),
    min_p=st.sampled_from([0.0, 0.07, 0.5]),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=examples(150), deadline=None)
def test_only_allowed_tokens_come_out(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    # equal numbers in float32 and float64, so that thresholds fall alike
    values = torch.tensor(logits, dtype=torch.float32)
    params = SamplingParams(temperature, top_k, top_p, min_p, seed)
    near = {
        token
        for nudge in (-1e-9, 0.0, 1e-9)
        for token in allowed_set(
            values.double().tolist(),
            SamplingParams(temperature, top_k, min(1.0, max(1e-12, top_p + nudge)), max(0.0, min_p + nudge), seed),
        )
    }
    assert all(int(sample(values, params, position)) in near for position in range(8))


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    params = SamplingParams(temperature=1.0, seed=11)
    counts = np.bincount([int(sample(logits, params, position)) for position in range(4000)], minlength=4)
    expected = np.array([2000, 1200, 600, 200])
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.5, seed=5)
    forwards = [int(sample(logits, params, position)) for position in range(30)]
    backwards = [int(sample(logits, params, position)) for position in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 5
    assert forwards != [
        int(sample(logits, SamplingParams(temperature=1.5, seed=6), position)) for position in range(30)
    ]


def test_greedy_takes_the_lowest_of_equal_ids_and_reports_its_logprob() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0])
    token = sample(logits, SamplingParams(temperature=0), 0)
    assert int(token) == 1
    assert token.logprob == pytest.approx(float(torch.log_softmax(logits.double(), 0)[1]))


@pytest.mark.parametrize("temperature", [1e-3, 1e-100, 5e-324])
def test_a_temperature_near_zero_is_greedy_and_not_broken(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, -40.0, 2.0, float("-inf")])
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.9)
    assert {int(sample(logits, params, position)) for position in range(20)} == {1}


def test_a_mask_forbids() -> None:
    logits = torch.tensor([5.0, 1.0, 4.0])
    mask = torch.tensor([False, True, True])
    assert int(sample(logits, SamplingParams(temperature=0), 0, mask)) == 2
    drawn = {int(sample(logits, SamplingParams(temperature=9.0), position, mask)) for position in range(50)}
    assert drawn == {1, 2}
    with pytest.raises(K2LiteError, match="no token is possible"):
        sample(logits, SamplingParams(), 0, torch.zeros(3, dtype=torch.bool))


def test_a_free_draw_that_is_not_allowed_is_made_again_under_the_mask() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, 1.5])
    mask = torch.tensor([False, True, True, True])
    params, masks = SamplingParams(temperature=1.0, seed=4), 0

    def made() -> torch.Tensor:
        nonlocal masks
        masks += 1
        return mask

    drawn = [
        int(sample_allowed(logits, params, position, lambda token: bool(mask[token]), made)) for position in range(4000)
    ]
    expected = torch.softmax(logits.masked_fill(~mask, -torch.inf), 0).numpy()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, expected, atol=0.03)
    free = float(torch.softmax(logits, 0)[0])
    assert masks == pytest.approx(4000 * free, rel=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_numbers_never_become_a_token(bad: float) -> None:
    with pytest.raises(K2LiteError, match="position 7 holds NaN or infinity"):
        sample(torch.tensor([0.0, bad, 1.0]), SamplingParams(temperature=0), 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("seed", -1),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=rf"{name} is .*expected"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
