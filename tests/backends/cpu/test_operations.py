"""Attention, norms, router and sums against the reference backend, each token alone and in company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.backends.base import RoutingRule, Segment
from k2lite.backends.cpu.backend import CpuBackend
from k2lite.backends.reference import ReferenceBackend
from tests.backends.cpu.samples import normal, relative_error, weight
from tests.samples import examples

REFERENCE = ReferenceBackend()
# format of kv_b, heads, nope, rotary, value, rank, tokens before
ATTENTION = [
    ("bf16", 8, 64, 32, 48, 256, 150),
    ("fp8_e4m3_b128", 5, 16, 8, 20, 33, 70),
    ("int8_channel", 3, 16, 8, 20, 36, 0),
    ("int4_g32", 70, 4, 64, 3, 512, 65),
    ("f32", 1, 5, 2, 3, 16, 64),
]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case[0])
def test_attention(cpu: CpuBackend, case: tuple[str, int, int, int, int, int, int]) -> None:
    format, heads, nope, rotary, value, rank, past = case
    kv_b, tokens = weight(format, heads * (nope + value), rank, 1), 7
    latents = [normal(past + tokens, rank + rotary, seed=2), normal(9 + tokens, rank + rotary, seed=3)]
    query = normal(2 * tokens, heads, nope + rotary, seed=4)
    q_nope, q_rope = query[..., :nope], query[..., nope:].clone()
    segments = [Segment(0, tokens, latents[0]), Segment(tokens, 2 * tokens, latents[1])]
    found = cpu.attention(q_nope, q_rope, segments, kv_b, 0.1)
    assert relative_error(found, REFERENCE.attention(q_nope, q_rope, segments, kv_b, 0.1).double()) < 1e-6
    for threads in (1, 3):
        assert torch.equal(CpuBackend(threads=threads).attention(q_nope, q_rope, segments, kv_b, 0.1), found)
    for t in range(tokens):
        alone = [Segment(0, 1, latents[0][: past + t + 1])]
        assert torch.equal(cpu.attention(q_nope[t : t + 1], q_rope[t : t + 1], alone, kv_b, 0.1)[0], found[t])


def test_attention_hands_a_nan_on(cpu: CpuBackend) -> None:
    kv_b, latent = weight("bf16", 2 * 12, 32, 1), normal(80, 40, seed=2)
    latent[70, 3] = float("nan")
    query = normal(80, 2, 16, seed=3)
    found = cpu.attention(query[..., :8], query[..., 8:], [Segment(0, 80, latent)], kv_b, 0.3)
    assert found[:70].isfinite().all()
    assert found[70:].isnan().all()


@given(tokens=st.integers(0, 5), width=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=examples(20), deadline=None)
def test_norms(cpu: CpuBackend, tokens: int, width: int, seed: int) -> None:
    x, scale = normal(tokens, width + 3, seed=seed)[:, :width], normal(width, seed=seed + 1)
    found = cpu.rms_norm(x, scale, 1e-6)
    exact = scale.double() * x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    for token in range(tokens):
        assert torch.equal(cpu.rms_norm(x[token : token + 1], scale, 1e-6)[0], found[token])


@pytest.mark.parametrize(
    "rule", [RoutingRule(3, 1, 1, True, 2.8), RoutingRule(4, 3, 2, True, 2.5), RoutingRule(2, 4, 1, False, 1.0)]
)
def test_the_router_chooses_as_the_reference_does(cpu: CpuBackend, rule: RoutingRule) -> None:
    matrix, bias, x = weight("f32", 12, 20, 1), 0.1 * normal(12, seed=2), normal(60, 20, seed=3)
    (ids, weights), (expected, theirs) = (b.router(x, matrix, bias, rule) for b in (cpu, REFERENCE))
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights, theirs, rtol=1e-5, atol=1e-6)
    for token in range(60):
        alone = cpu.router(x[token : token + 1], matrix, bias, rule)
        assert torch.equal(alone[0][0], ids[token])
        assert torch.equal(alone[1][0], weights[token])
    assert [part.shape for part in cpu.router(x[:0], matrix, bias, rule)] == [(0, rule.num_experts_per_tok)] * 2


def test_equal_scores_go_to_the_lowest_expert_and_nan_is_seen(cpu: CpuBackend) -> None:
    rule = RoutingRule(2, 1, 1, True, 1.0)
    matrix, bias = weight("f32", 6, 8, 1), torch.zeros(6)
    matrix.parts["weight"].zero_()
    ids, weights = cpu.router(torch.ones(1, 8), matrix, bias, rule)
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [[0.5, 0.5]]
    assert cpu.router(torch.full((1, 8), float("nan")), matrix, bias, rule)[1].isnan().all()


def test_sums_are_the_references_bit_for_bit(cpu: CpuBackend) -> None:
    results, weights, shared = normal(3, 4, 2100, seed=1), normal(3, 4, seed=2), normal(3, 2100, seed=3)
    assert torch.equal(cpu.combine(results, weights, shared), REFERENCE.combine(results, weights, shared))
