"""The training model against plain loops with autograd's own gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo_training import transformer
from tools.demo_training.transformer import Transformer, sorted_places

from .miniature import random_batch


def plain_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, choice by choice."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros(x.shape[1])
        for place, expert in enumerate(ids[token].tolist()):
            gate, up = gate_up[expert] @ x[token]
            total = total + weights[token, place] * (down[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_routed_experts_and_their_gradients_equal_a_plain_loop(
    low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "LOW", low)
    torch.manual_seed(0)
    tokens, active, experts, hidden, width = 37, 3, 6, 16, 8
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, active)
    # the last expert is never chosen
    ids = torch.stack([torch.randperm(experts - 1)[:active] for _ in range(tokens)])
    gate_up, down = torch.randn(experts, 2, width, hidden) / 4, torch.randn(experts, hidden, width) / 3
    wanted = torch.randn(tokens, hidden)
    results = []
    for function in (transformer._RoutedExperts.apply, plain_experts):
        leaves = [part.clone().requires_grad_() for part in (x, weights, gate_up, down)]
        out = function(leaves[0], leaves[1], ids, leaves[2], leaves[3])
        (out * wanted).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        assert ours is not None
        assert plain is not None
        error = (ours - plain).abs().max() / plain.abs().max()
        assert error < (1e-5 if low is torch.float32 else 0.02)
    assert not results[0][3][-1].any()


def test_sorted_places_puts_each_choice_in_its_experts_span_once() -> None:
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(9)[:4] for _ in range(200)])
    choice, row, spans = sorted_places(ids, 9)
    assert [end - begin for _, begin, end in spans] == [
        -(-int((ids == expert).sum()) // transformer.PAD_ROWS) * transformer.PAD_ROWS for expert, _, _ in spans
    ]
    assert torch.equal(choice[row], torch.arange(ids.numel()))
    assert int((choice < ids.numel()).sum()) == ids.numel()
    flat = ids.flatten()
    for expert, begin, end in spans:
        inside = choice[begin:end]
        assert (flat[inside[inside < ids.numel()]] == expert).all()


def test_a_document_does_not_see_its_neighbour_in_the_row(model: Transformer) -> None:
    batch = random_batch(0, rows=1)
    half = batch.ids.shape[1] // 2
    together = model(batch.ids, batch.positions, batch.documents)
    changed = batch.ids.clone()
    changed[:, :half] = (changed[:, :half] + 1) % 100
    assert torch.equal(model(changed, batch.positions, batch.documents)[:, half:], together[:, half:])


def test_a_token_does_not_see_what_follows(model: Transformer) -> None:
    batch = random_batch(0, rows=1)
    one = torch.zeros_like(batch.documents)
    changed = batch.ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 100
    before, after = (model(ids, batch.positions, one)[:, :15] for ids in (batch.ids, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)


def test_the_router_chooses_with_the_bias_and_weighs_without(model: Transformer) -> None:
    moe = model.moes[0]
    x = torch.randn(5, model.c.hidden_size)
    with torch.no_grad():
        moe.bias[2] = 10.0
        out = moe(x)
        scores = torch.sigmoid(x @ moe.router.weight.T)
        weights = scores.gather(-1, moe.ids)
        weights = weights / weights.sum(-1, keepdim=True) * model.c.routed_scaling_factor
        expected = plain_experts(x, weights, moe.ids, moe.gate_up_proj, moe.down_proj) + moe.shared_experts(x)
    assert (moe.ids == 2).any(-1).all()
    assert (out - expected).abs().max() / expected.abs().max() < 0.02
