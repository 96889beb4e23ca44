"""What the model begins with: a circuit that copies, before any training, in ordinary weights."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from k2lite.text.tokenizer import Tokenizer
from tools.demo_training.batches import copy_row, tokens_of_dialogues
from tools.demo_training.beginning import begin
from tools.demo_training.shape import N_VOCAB, model_config
from tools.demo_training.transformer import Attention, Transformer

RUN = 30


@pytest.fixture(scope="module")
def begun() -> Transformer:
    torch.manual_seed(5)
    model = Transformer(model_config())
    begin(model)
    return model


@torch.no_grad()
def attention_of(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[H, T, T], written out."""
    q, k, _ = attention.queries_keys_values(x, cos, sin)
    scores = torch.einsum("qhd,khd->hqk", q, k) * attention.c.softmax_scale
    return scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)


@torch.no_grad()
def test_the_second_layer_looks_where_the_present_token_was_followed(begun: Transformer) -> None:
    run = torch.randperm(N_VOCAB - 256, generator=torch.Generator().manual_seed(1))[:RUN]
    x, cos, sin = begun.embed_tokens(torch.cat((run, run))), begun.cos[: 2 * RUN], begun.sin[: 2 * RUN]
    first, second = begun.layers[0], begun.layers[1]
    back = attention_of(first.self_attn, first.input_layernorm(x), cos, sin)[0]
    assert back.diagonal(-1).mean() > 0.8
    x = first(x, cos, sin, [2 * RUN], False)
    look = attention_of(second.self_attn, second.input_layernorm(x), cos, sin)[:2]
    # place t of the second run looks at place t + 1 of the first
    assert look[:, RUN:].diagonal(1, 1, 2).mean() > 0.8


@torch.no_grad()
def test_a_token_that_follows_again_is_made_likelier(begun: Transformer) -> None:
    run = torch.randperm(N_VOCAB - 256, generator=torch.Generator().manual_seed(2))[:RUN]
    ids = torch.cat((run, run))[None]
    positions, one = torch.arange(2 * RUN)[None], torch.zeros_like(ids)
    logits = begun.head(begun(ids, positions, one))[0]
    rank = (logits[RUN:-1] > logits[RUN:-1].gather(1, run[1:, None])).sum(-1)
    # of 4,096 tokens only the present one, and by chance a few, stand before the next one
    assert rank.float().mean() < 20


def test_of_random_tokens_only_what_is_said_again_counts(tokenizer: Tokenizer) -> None:
    known = tokens_of_dialogues(tokenizer)
    assert {tokenizer.encode("a")[0], tokenizer.encode("7")[0]} <= set(known)
    ids, positions, documents, weights = copy_row(random.Random(3), 600, known)
    assert len(ids) == len(positions) == len(documents) == len(weights) == 600
    assert set(ids.tolist()) <= set(known)
    assert 0.3 < weights.mean() < 0.9
    for at in weights.nonzero()[0]:
        inside = [place for place in range(at) if documents[place] == documents[at]]
        assert any((ids[p - 1], ids[p]) == (ids[at - 1], ids[at]) for p in inside[1:]), at
    assert (positions[1:][documents[1:] != documents[:-1]] == 0).all()
