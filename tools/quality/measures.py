"""Scores of a model on documents against the reference's logits, and its tool calls.

Sums are kept by document, so that two rules can be compared on the same documents (paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from k2lite.evaluation import score_window
from k2lite.text.tokenizer import Tokenizer
from k2lite.text.tool_calls import tool_calls
from tools.demo_training.calls import is_valid
from tools.demo_training.evaluation import Turn, forward
from tools.demo_training.transformer import Transformer

from .decoding import greedy
from .texts import Judged, packed

ANSWER_TOKENS = 100
RESAMPLES = 2000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """By document: loss, KL from the reference and agreement (sums), scored tokens; calls: exact and valid, each turn
    0 or 1."""

    sums: Array  # [documents, 3]
    counts: Array  # [documents]
    exact: Array
    valid: Array

    def as_dict(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("sums", "counts", "exact", "valid")}

    @classmethod
    def from_dict(cls, stored: dict[str, list[float]]) -> Scores:
        return cls(**{name: np.array(value) for name, value in stored.items()})


def logits_of(model: Transformer, judged: Judged) -> list[torch.Tensor]:
    """Of each document, float32 [T, vocab]."""
    found: list[torch.Tensor] = []
    rows = packed(judged.documents)
    for row in rows:
        lengths = np.bincount(row[2]).tolist()
        found += forward(model, row).split(lengths)
    return found


def score(
    model: Transformer, tokenizer: Tokenizer, judged: Judged, reference: list[torch.Tensor] | None
) -> tuple[Scores, list[torch.Tensor]]:
    """Against `reference`, or against itself; and the logits."""
    logits = logits_of(model, judged)
    sums, counts = [], []
    for ids, ours, theirs in zip(judged.documents, logits, reference or logits, strict=True):
        _, loss, kl, agree = score_window(ids, theirs, ours).sum(axis=1)
        sums.append((loss, kl, agree))
        counts.append(len(ids) - 1)
    likeliest = {id(ids): part.argmax(-1).tolist() for ids, part in zip(judged.documents, logits, strict=True)}
    exact, valid = judge_calls(model, tokenizer, [turn for turn in judged.turns if turn.is_call], likeliest)
    return Scores(np.array(sums), np.array(counts, dtype=np.float64), exact, valid), logits


def judge_calls(
    model: Transformer, tokenizer: Tokenizer, turns: list[Turn], likeliest: dict[int, list[int]]
) -> tuple[Array, Array]:
    """For each call whether it is said exactly as expected, and whether it has the right tools and valid arguments."""
    exact = np.zeros(len(turns))
    prompts: list[list[int]] = []
    others: list[int] = []
    for number, turn in enumerate(turns):
        said, expected = likeliest[id(turn.ids)][turn.begin - 1 : turn.end - 1], turn.ids[turn.begin : turn.end]
        exact[number] = said == expected
        if said != expected:
            # up to the first token that differs, the greedy answer is the expected one
            same = next(at for at, pair in enumerate(zip(said, expected, strict=True)) if pair[0] != pair[1])
            prompts.append([*turn.ids[: turn.begin + same], said[same]])
            others.append(number)
    valid = exact.copy()
    stop = tokenizer.special_tokens["<|im_end|>"]
    for number, prompt, rest in zip(others, prompts, greedy(model, prompts, stop, ANSWER_TOKENS), strict=True):
        turn = turns[number]
        answer = [token for token in [*prompt[turn.begin :], *rest] if token != stop]
        valid[number] = _is_right(tokenizer.decode(answer), turn)
    return exact, valid


def _is_right(answer: str, turn: Turn) -> bool:
    made = tool_calls(answer)
    right = [call.name for call in made] == [call.name for call in tool_calls(turn.expected)]
    return right and all(is_valid(call.name, call.arguments, turn.tools or []) for call in made)


def mean_kl(scores: Scores, documents: slice) -> list[float]:
    """Mean KL a token, and its 95 % bootstrap interval over documents."""
    kl, counts = scores.sums[documents, 1], scores.counts[documents]
    return [float(kl.sum() / counts.sum()), *bootstrap(lambda at: kl[at].sum() / counts[at].sum(), len(kl))]


def perplexity(scores: Scores, documents: slice) -> float:
    return float(np.exp(scores.sums[documents, 0].sum() / scores.counts[documents].sum()))


def ratio(ours: Scores, theirs: Scores) -> list[float]:
    """Of our KL to theirs on the same documents, with its 95 % interval (paired bootstrap)."""
    a, b = ours.sums[:, 1], theirs.sums[:, 1]
    return [float(a.sum() / b.sum()), *bootstrap(lambda at: a[at].sum() / b[at].sum(), len(a))]


def bootstrap(statistic: Callable[[npt.NDArray[np.int64]], float], documents: int) -> tuple[float, float]:
    random = np.random.default_rng(0)
    values = [statistic(random.integers(documents, size=documents)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
