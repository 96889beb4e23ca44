"""The yardsticks: Kneser-Ney against a dictionary version, calls judged, spans and tables on known cases."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from k2lite.text.tokenizer import Tokenizer
from tools.demo_training.batches import text_row
from tools.demo_training.calls import is_valid
from tools.demo_training.evaluation import forward, held_out_turns, largest_logits, routing_table
from tools.demo_training.ngram import ORDER, KneserNey
from tools.demo_training.transformer import Transformer

TOOLS = [
    {
        "function": {
            "name": "plan_trip",
            "parameters": {
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "mode": {"type": "string", "enum": ["fast", "slow"]},
                },
                "required": ["city", "days"],
            },
        }
    }
]


def plain_kneser_ney(pieces: list[list[int]], n_vocab: int, context: tuple[int, ...], token: int) -> float:
    """Chen and Goodman's recursion, counted with dictionaries."""
    counts: dict[int, Counter[tuple[int, ...]]] = {}
    counts[ORDER] = Counter(tuple(p[at : at + ORDER]) for p in pieces for at in range(len(p) - ORDER + 1))
    for order in range(ORDER - 1, 0, -1):
        counts[order] = Counter(gram[1:] for gram in counts[order + 1])

    def probability(history: tuple[int, ...], token: int) -> float:
        order = len(history) + 1
        of = counts[order]
        n = [sum(count == k for count in of.values()) for k in range(5)]
        y = n[1] / (n[1] + 2 * n[2])
        discount = defaultdict(float, {k: k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)})
        lower = probability(history[1:], token) if history else 1 / n_vocab
        following = {gram: count for gram, count in of.items() if gram[:-1] == history}
        total = sum(following.values())
        if not total:
            return lower
        taken = sum(discount[min(count, 3)] for count in following.values())
        count = of[(*history, token)]
        return (count - discount[min(count, 3)]) / total + taken / total * lower

    return probability(context, token)


def test_kneser_ney_probabilities_sum_to_one() -> None:
    rng, n_vocab = random.Random(4), 6
    pieces = [[min(int(rng.expovariate(0.6)), n_vocab - 1) for _ in range(400)] for _ in range(3)]
    model = KneserNey([np.array(piece, dtype=np.uint16) for piece in pieces], n_vocab)
    contexts = [[rng.randrange(n_vocab) for _ in range(ORDER - 1)] for _ in range(12)]
    contexts += [pieces[0][at : at + ORDER - 1] for at in range(12)]
    for context in contexts:
        grams = (np.array([*context, token], dtype=np.uint16) for token in range(n_vocab))
        assert sum(np.exp(model.log_probabilities(gram)[0]) for gram in grams) == pytest.approx(1.0)


def test_kneser_ney_probabilities_are_those_of_the_dictionary_version() -> None:
    rng, n_vocab = random.Random(7), 60
    pieces = [[min(int(rng.paretovariate(0.7)) - 1, n_vocab - 1) for _ in range(300)] for _ in range(2)]
    model = KneserNey([np.array(piece, dtype=np.uint16) for piece in pieces], n_vocab)
    for at in range(0, 200, 9):
        context, token = tuple(pieces[0][at : at + ORDER - 1]), rng.randrange(n_vocab)
        ours = float(model.log_probabilities(np.array([*context, token], dtype=np.uint16))[0])
        assert np.exp(ours) == pytest.approx(plain_kneser_ney(pieces, n_vocab, context, token), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments", "valid"),
    [
        ("plan_trip", '{"city": "Rome", "days": 3}', True),
        ("plan_trip", '{"city": "Rome", "days": 3, "mode": "slow"}', True),
        ("plan_trip", '{"city": "Rome"}', False),
        ("plan_trip", '{"city": "Rome", "days": "3"}', False),
        ("plan_trip", '{"city": "Rome", "days": true}', False),
        ("plan_trip", '{"city": "Rome", "days": 3, "mode": "odd"}', False),
        ("plan_trip", '{"city": "Rome", "days": 3, "extra": 1}', False),
        ("plan_trip", '{"city": "Rome", "days": 3', False),
        ("plan_trip", "[]", False),
        ("other", '{"city": "Rome", "days": 3}', False),
    ],
)
def test_a_call_is_valid_if_the_tool_exists_and_the_schema_is_met(name: str, arguments: str, valid: bool) -> None:
    assert is_valid(name, arguments, TOOLS) is valid


def test_turns_end_with_the_end_of_turn_and_hold_what_was_said(tokenizer: Tokenizer) -> None:
    turns = held_out_turns(tokenizer, dialogues=20, questions=2)
    end = tokenizer.special_tokens["<|im_end|>"]
    for turn in turns:
        assert turn.ids[turn.end - 1] == end
        assert tokenizer.decode(turn.ids[: turn.begin]).endswith("<|im_assistant|>assistant<|im_middle|>")
        assert turn.expected == tokenizer.decode(turn.ids[turn.begin : turn.end - 1])
    assert {turn.kind for turn in turns if turn.is_call} <= {"single", "parallel", "chain"}
    assert held_out_turns(tokenizer, dialogues=20, questions=2) == turns


def test_the_routing_table_counts_what_the_router_chose(model: Transformer) -> None:
    dialogues = [text_row(np.arange(20, dtype=np.uint16)), text_row(np.arange(30, 70, dtype=np.uint16))]
    texts = [text_row(np.arange(100, 150, dtype=np.uint16))]
    for moe in model.moes:
        moe.bias[0] = 10.0
    rows = routing_table(model, dialogues, texts)
    chosen = torch.zeros(len(model.moes), model.c.n_routed_experts)
    for row in (*dialogues, *texts):
        forward(model, row)
        for layer, moe in enumerate(model.moes):
            chosen[layer] += torch.bincount(moe.ids.flatten(), minlength=model.c.n_routed_experts)
    assert [row["least_share"] for row in rows] == pytest.approx((chosen.amin(1) / chosen.sum(1)).tolist())
    assert [row["layer"] for row in rows] == [1, 2]
    for row in rows:
        # expert 0 is in each token's three, so it has a third of all choices, 8 / 3 of the mean
        assert row["most_over_mean"] == pytest.approx(8 / 3)
        assert row["lag1_reuse"] >= 1 / 3
        assert row["top_quarter_least"] <= row["top_quarter_in_dialogue"]
        assert row["top_quarter_in_dialogue"] > 1 / 3


def test_the_largest_logit_is_over_all_rows(model: Transformer) -> None:
    rows = [text_row(np.arange(at, at + 20, dtype=np.uint16)) for at in (0, 100)]
    alone = [largest_logits(model, [row]) for row in rows]
    assert largest_logits(model, rows) == [max(pair) for pair in zip(*alone, strict=True)]
