"""MuonClip against the Kimi K2 report: QK-Clip per head, Muon's update written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.demo_training.muonclip import Muon, orthogonalize, qk_clip
from tools.demo_training.shape import model_config
from tools.demo_training.transformer import Attention, Transformer

from .miniature import CHANGES, random_batch

TOKENS = 12


def attention_and_input(gain: float) -> tuple[Attention, Tensor, Tensor, Tensor]:
    """Attention whose heads differ in size, an input, its rotary tables."""
    torch.manual_seed(3)
    c = model_config(CHANGES)
    attention = Attention(c)
    with torch.no_grad():
        heads = attention.q_b_proj.weight.view(c.num_attention_heads, -1, c.q_lora_rank)
        heads *= gain * torch.tensor([1.0, 0.05])[:, None, None]
    cos, sin = c.rope.tables(torch.arange(TOKENS))
    return attention, torch.randn(TOKENS, c.hidden_size), cos, sin


@torch.no_grad()
def logits_of(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[H, T, T], the scaled products themselves."""
    q, k, _ = attention.queries_keys_values(x, cos, sin)
    return torch.einsum("qhd,khd->hqk", q, k) * attention.c.softmax_scale


def test_the_largest_logit_is_each_heads_own_and_counts_only_what_is_seen() -> None:
    attention, x, cos, sin = attention_and_input(1.0)
    documents = [5, TOKENS - 5]
    attention(x, cos, sin, documents, True)
    mask = torch.block_diag(*(torch.ones(tokens, tokens) for tokens in documents)).tril().bool()
    seen = logits_of(attention, x, cos, sin).masked_fill(~mask, 0).abs()
    assert attention.max_logits is not None
    torch.testing.assert_close(attention.max_logits, seen.amax(dim=(1, 2)))


def test_qk_clip_scales_every_logit_of_a_clipped_head_by_gamma_and_no_other_head() -> None:
    attention, x, cos, sin = attention_and_input(40.0)
    attention(x, cos, sin, [TOKENS], True)
    assert attention.max_logits is not None
    threshold = float(attention.max_logits.min()) * 2
    gamma = threshold / attention.max_logits[0]
    assert gamma < 0.9
    before, key_value = logits_of(attention, x, cos, sin), attention.kv_b_proj.weight.clone()
    shared = attention.kv_a_proj_with_mqa.weight.clone()
    assert qk_clip(attention, threshold) == 1
    after = logits_of(attention, x, cos, sin)
    torch.testing.assert_close(after[0], before[0] * gamma, rtol=1e-4, atol=1e-4)
    assert torch.equal(after[1], before[1])
    # the shared rotary key and the values are nobody's to scale
    assert torch.equal(attention.kv_a_proj_with_mqa.weight, shared)
    nope = attention.c.qk_nope_head_dim
    values = (w.view(2, -1, attention.c.kv_lora_rank)[:, nope:] for w in (attention.kv_b_proj.weight, key_value))
    assert torch.equal(*values)
    attention(x, cos, sin, [TOKENS], True)
    torch.testing.assert_close(attention.max_logits.max(), torch.tensor(threshold), rtol=1e-4, atol=0)


def test_qk_clip_leaves_the_function_unchanged_below_the_threshold() -> None:
    attention, x, cos, sin = attention_and_input(40.0)
    before = attention(x, cos, sin, [TOKENS], True)
    weights = {name: value.clone() for name, value in attention.state_dict().items()}
    assert attention.max_logits is not None
    assert qk_clip(attention, float(attention.max_logits.max()) * 1.001) == 0
    assert all(torch.equal(value, weights[name]) for name, value in attention.state_dict().items())
    assert torch.equal(attention(x, cos, sin, [TOKENS], True), before)


def test_qk_clip_bounds_the_logits_of_a_training_that_drives_them_up() -> None:
    threshold = 5.0

    def largest_after_training(*, clip: bool) -> float:
        attention, x, cos, sin = attention_and_input(1.0)
        optimizer = Muon([attention.q_b_proj.weight, attention.kv_b_proj.weight], lr=0.05, weight_decay=0.0)
        for _ in range(60):
            q, k, _ = attention.queries_keys_values(x, cos, sin)
            (-torch.einsum("thd,thd->th", q, k).mean()).backward()
            optimizer.step()
            attention.zero_grad(set_to_none=True)
            attention(x, cos, sin, [TOKENS], True)
            if clip:
                qk_clip(attention, threshold)
        return float(logits_of(attention, x, cos, sin).tril().abs().max())

    assert largest_after_training(clip=False) > 4 * threshold
    assert largest_after_training(clip=True) <= threshold * 1.0001


def test_qk_clip_without_a_forward_pass_is_an_error() -> None:
    with pytest.raises(ValueError, match="measures them"):
        qk_clip(Attention(model_config(CHANGES)), 30.0)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 16, 24), (2, 3, 24, 16)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_directions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape)
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    made = orthogonalize(update)
    values = torch.linalg.svdvals(made)
    assert 0.5 < values.min() < values.max() < 1.3
    # the nearest semi-orthogonal matrix keeps the singular vectors
    aligned = (u.mT @ made @ v.mT).diagonal(dim1=-2, dim2=-1)
    assert (aligned > 0.5).all()


def test_muon_steps_as_the_report_writes_it() -> None:
    """Two steps of a matrix and of a stack: M <- mu M + G, Nesterov, RMS factor 0.2 sqrt(max(n, m)), decay."""
    torch.manual_seed(1)
    lr, mu, decay = 0.02, 0.95, 0.1
    stack = torch.randn(3, 8, 20)
    parameter, momentum = torch.nn.Parameter(stack.clone()), torch.zeros_like(stack)
    optimizer = Muon([parameter], lr=lr, momentum=mu, weight_decay=decay)
    expected = stack.clone()
    for _ in range(2):
        gradient = torch.randn_like(stack)
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = mu * momentum + gradient
        for at in range(3):
            update = orthogonalize(gradient[at] + mu * momentum[at]) * 0.2 * 20**0.5
            expected[at] -= lr * (update + decay * expected[at])
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=2e-4)


def test_muon_gets_the_matrices_and_adam_the_embeddings_head_and_norms(model: Transformer) -> None:
    from tools.demo_training.training import split_parameters

    matrices, rest = (set(map(id, group)) for group in split_parameters(model))
    # lm_head is the same parameter as embed_tokens
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    adams = {name for name in names if "norm" in name or name.startswith("embed_tokens")}
    assert {name for name, key in names.items() if key in rest} == adams
    assert {name for name, key in names.items() if key in matrices} == set(names) - adams


def plain_newton_schulz(matrix: Tensor) -> Tensor:
    """The iteration as Keller Jordan writes it, x <- a x + (b s + c s s) x, in float64."""
    x = matrix.double() / (matrix.double().norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (64, 256)])
def test_the_commuted_iteration_is_the_plain_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    stack = torch.randn(2, *shape) * torch.logspace(0, -3, shape[1])
    for made, matrix in zip(orthogonalize(stack), stack, strict=True):
        torch.testing.assert_close(made.double(), plain_newton_schulz(matrix), rtol=0, atol=2e-3)


def test_balance_lowers_the_bias_of_the_busy_and_raises_that_of_the_idle(model: Transformer) -> None:
    batch = random_batch(0)
    model(batch.ids, batch.positions, batch.documents)
    moe = model.moes[0]
    load = moe.load.clone()
    assert int(load.sum()) == batch.ids.numel() * model.c.num_experts_per_tok
    shares = torch.linspace(0.1, 3.0, len(load))
    moe.balance(shares / shares.mean(), 0.001, (0.5, 1.5))
    share = shares / shares.mean()
    expected = [0.001 if value < 0.5 else -0.001 if value > 1.5 else 0.0 for value in share.tolist()]
    assert {0.001, -0.001, 0.0} == set(expected)
    torch.testing.assert_close(moe.bias, torch.tensor(expected))
    moe.bias.zero_()
    moe.balance(load, 0.001, (1.0, 1.0))
    torch.testing.assert_close(moe.bias, 0.001 * torch.sign(load.mean() - load))
