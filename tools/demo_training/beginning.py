"""What the model begins with: random weights, but for one circuit that copies.

A tool call is copying: a name, a value, a digit that stands further up. Attention learns it late, because it takes two
heads of which neither is of use alone, and query and key have no bias, so that attention by position starts from a
product of two numbers that are zero on average. A small model on two cores has no time for that. So the first layer
begins with a head that looks at the token before, and the second with heads that look for a place whose token before
was the present one, and say what stands there (an induction head: Olsson et al., arXiv 2209.11895). Both are ordinary
weights from the first step on, and training changes them like all others.

Shapes: D hidden, H heads; x is a normalized input, of length sqrt(D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .transformer import Attention, Transformer

# Of an embedding's energy, what all tokens have in common: something to attend by position with.
CONSTANT_SHARE = 0.5
SIGNATURE = 32  # directions that tell a token when it is looked for
SAID = 64  # directions that tell it when it is said again, SIGNATURE a head
LOOK_BACK_FREQUENCIES = 3
LOOK_BACK_KEY, LOOK_BACK_QUERY = 5.0, 7.0  # 0.9 of the attention is on the token before
NOTE_LENGTH = 0.7  # of what the first layer notes about the token before; an embedding's length is 1
MATCH_GAIN = 2.2  # a token that is found has a logit of about 20
SAY_LENGTH = 1.0


@dataclass(frozen=True)
class Directions:
    """Orthonormal rows: what all tokens share [D], what is read of a token [SIGNATURE, D], where the token before is
    noted [SIGNATURE, D], what is said again [SAID, D]."""

    constant: Tensor
    read: Tensor
    note: Tensor
    said: Tensor


@torch.no_grad()
def begin(model: Transformer) -> None:
    """Give embeddings a common part and wire the first two layers; model.c must have room for it (`can_begin`)."""
    c = model.c
    columns = torch.linalg.qr(torch.randn(c.hidden_size, 1 + 2 * SIGNATURE + SAID)).Q.T
    directions = Directions(*(part.squeeze(0) for part in columns.split([1, SIGNATURE, SIGNATURE, SAID])))
    random = model.embed_tokens.weight * (1 - CONSTANT_SHARE) ** 0.5
    model.embed_tokens.weight.copy_(random + CONSTANT_SHARE**0.5 * directions.constant)
    theta = torch.atan2(model.sin[1], model.cos[1])[:LOOK_BACK_FREQUENCIES]
    _look_back(model.layers[0].self_attn, directions, theta)
    _say_again(model.layers[1].self_attn, directions)


def _look_back(attention: Attention, d: Directions, theta: Tensor) -> None:
    """Head 0 looks at the token before and notes its signature."""
    c = attention.c
    size = c.hidden_size**0.5
    common = CONSTANT_SHARE**0.5  # of a normalized vector's length, the part along `constant`
    keys = attention.kv_a_proj_with_mqa.weight[c.kv_lora_rank :].view(-1, 2, c.hidden_size)
    keys[: len(theta), 0] = LOOK_BACK_KEY / (common * size) * d.constant
    keys[: len(theta), 1] = 0
    latent = torch.nn.functional.normalize(attention.q_a_proj.weight @ d.constant, dim=0)
    queries = attention.q_b_proj.weight[c.qk_nope_head_dim :][: c.qk_rope_head_dim].view(-1, 2, c.q_lora_rank)
    turned = torch.stack((torch.cos(theta), -torch.sin(theta)), -1)
    queries[: len(theta)] = LOOK_BACK_QUERY / (common * c.q_lora_rank**0.5) * turned[..., None] * latent
    queries[len(theta) :] = 0
    attention.q_b_proj.weight[: c.qk_nope_head_dim] = 0
    _read_latent(attention, 0, d.read, (1 - CONSTANT_SHARE) ** -0.5)
    _value_of_head(attention, 0, 0)
    attention.o_proj.weight[:, : c.v_head_dim] = NOTE_LENGTH / SIGNATURE**0.5 * d.note.T


def _say_again(attention: Attention, d: Directions) -> None:
    """A head for each SIGNATURE of `said`: they look where the token before was the present one."""
    c = attention.c
    length = (1 + NOTE_LENGTH**2) ** 0.5  # of the residual stream here, before it is normalized
    token = (1 - CONSTANT_SHARE) ** 0.5 / length
    attention.q_a_proj.weight[:SIGNATURE] = d.read / token
    _read_latent(attention, 0, d.note, length / NOTE_LENGTH / (c.hidden_size / SIGNATURE) ** 0.5)
    _read_latent(attention, SIGNATURE, d.said, 1 / token)
    per_head = c.qk_nope_head_dim + c.qk_rope_head_dim
    per_key = c.qk_nope_head_dim + c.v_head_dim
    eye = torch.eye(SIGNATURE)
    for head in range(SAID // SIGNATURE):
        query = attention.q_b_proj.weight[head * per_head : (head + 1) * per_head]
        query.zero_()
        query[:SIGNATURE, :SIGNATURE] = MATCH_GAIN**0.5 * 1.25 * eye
        key = attention.kv_b_proj.weight[head * per_key :][: c.qk_nope_head_dim]
        key.zero_()
        key[:, :SIGNATURE] = MATCH_GAIN**0.5 * 1.25 * eye
        _value_of_head(attention, head, SIGNATURE * (1 + head))
        part = d.said[head * SIGNATURE : (head + 1) * SIGNATURE]
        out = attention.o_proj.weight[:, head * c.v_head_dim : (head + 1) * c.v_head_dim]
        out.copy_(SAY_LENGTH / SAID**0.5 * part.T)


def _read_latent(attention: Attention, at: int, directions: Tensor, gain: float) -> None:
    """Rows of the key-value latent that read `directions`, about 1 each."""
    attention.kv_a_proj_with_mqa.weight[at : at + len(directions)] = gain * directions


def _value_of_head(attention: Attention, head: int, at: int) -> None:
    """The head's value is the latent's entries from `at` on, as they are."""
    c = attention.c
    begin_row = head * (c.qk_nope_head_dim + c.v_head_dim) + c.qk_nope_head_dim
    value = attention.kv_b_proj.weight[begin_row : begin_row + c.v_head_dim]
    value.zero_()
    value[:, at : at + c.v_head_dim] = torch.eye(c.v_head_dim)
