"""What the demo model can do, on tools, names, values and texts that training never saw.

The weights are those that ship (rounded to FP8). A greedy answer equals the expected one exactly if every token of it
is the likeliest after the expected ones before, so one forward pass judges most dialogues; where a call differs, the
k2lite runtime generates it, and its name and schema are judged.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import k2lite
from k2lite.text.tokenizer import Tokenizer
from k2lite.text.tool_calls import tool_calls

from .batches import Row, said_by_assistant, text_row
from .calls import is_valid
from .ngram import ORDER, KneserNey
from .questions import KINDS, question
from .shape import N_VOCAB, TRAINED_TOKENS
from .tools_data import tool_dialogue
from .transformer import Transformer

ANSWER_TOKENS = 160


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: its dialogue's tokens, its span in them, what it is, the tools offered, the text."""

    ids: list[int]
    begin: int
    end: int
    kind: str
    tools: list[dict[str, Any]] | None
    expected: str

    @property
    def is_call(self) -> bool:
        return bool(tool_calls(self.expected))


def held_out_turns(tokenizer: Tokenizer, dialogues: int, questions: int) -> list[Turn]:
    """Seeded held-out dialogues, `dialogues` of tool use and `questions` of each kind of question."""
    rng = random.Random("held out")
    turns: list[Turn] = []
    for _ in range(dialogues):
        made = tool_dialogue(rng, held_out=True)
        turns += _turns(tokenizer, made.messages, made.tools, made.kind)
    for kind in KINDS:
        for _ in range(questions):
            asked = question(rng, held_out=True, kind=kind)
            messages = [{"role": "user", "content": asked.question}, {"role": "assistant", "content": asked.answer}]
            turns += _turns(tokenizer, messages, None, kind)
    return turns


def _turns(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kind: str
) -> list[Turn]:
    ids = tokenizer.render(messages, tools, add_generation_prompt=False).ids
    said = [*said_by_assistant(ids, tokenizer.special_tokens), False]
    begins = [at for at, own in enumerate(said) if own and not said[at - 1]]
    ends = [at for at, own in enumerate(said) if not own and said[at - 1] and at]
    spans = zip(begins, ends, strict=True)
    return [Turn(ids, a, b, kind, tools, tokenizer.decode(ids[a : b - 1])) for a, b in spans]


@torch.no_grad()
def forward(model: Transformer, row: Row) -> torch.Tensor:
    """Logits float32 [T, vocab] of one row."""
    ids, positions, documents, _ = (torch.from_numpy(part)[None] for part in row)
    logits: torch.Tensor = model.head(model(ids, positions, documents))[0]
    return logits


def judge_turns(model: Transformer, engine: k2lite.Engine, turns: list[Turn]) -> dict[str, dict[str, float]]:
    """Per kind of turn: how many, how many of them differ, the share answered exactly as expected and, for calls, the
    share with the right tools and arguments that satisfy the schemas."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    distinct: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    previous: list[int] = []
    for turn in turns:
        if turn.ids is not previous:
            likeliest = forward(model, text_row(np.array(turn.ids, dtype=np.uint16))).argmax(-1).tolist()
            previous = turn.ids
        exact = likeliest[turn.begin - 1 : turn.end - 1] == turn.ids[turn.begin : turn.end]
        kind = f"{turn.kind}: call" if turn.is_call else f"{turn.kind}: answer"
        names = (kind, "all calls" if turn.is_call else "all answers from results") if turn.tools else (kind,)
        valid = turn.is_call and (exact or _valid_call(engine, turn))
        for name in names if turn.kind != "none" or turn.is_call else (kind,):
            table[name]["turns"] += 1
            distinct[name].add(tuple(turn.ids[: turn.begin]))
            table[name]["exact"] += exact
            if turn.is_call:
                table[name]["right tool, valid"] += valid
    return {
        name: {"distinct": len(distinct[name])}
        | {key: value if key == "turns" else value / row["turns"] for key, value in row.items()}
        for name, row in table.items()
    }


def _valid_call(engine: k2lite.Engine, turn: Turn) -> bool:
    """Generate the turn with the runtime; right if it calls the expected tools in order, each validly."""
    tokens = engine.generate(turn.ids[: turn.begin], max_tokens=ANSWER_TOKENS, temperature=0)
    made = tool_calls(engine.tokenizer.decode(tokens))
    right = [call.name for call in made] == [call.name for call in tool_calls(turn.expected)]
    return right and all(is_valid(call.name, call.arguments, turn.tools or []) for call in made)


def text_perplexity(model: Transformer, text: npt.NDArray[np.uint16]) -> float:
    """Of windows of the trained length, each from an empty context."""
    total, count = 0.0, 0
    for at in range(0, len(text) - TRAINED_TOKENS, TRAINED_TOKENS):
        window = text[at : at + TRAINED_TOKENS + 1]
        logits = forward(model, text_row(window[:-1]))
        targets = torch.from_numpy(window[1:].astype(np.int64))
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return float(np.exp(total / count))


def ngram_perplexity(trained_on: list[npt.NDArray[np.uint16]], text: npt.NDArray[np.uint16]) -> float:
    model = KneserNey(trained_on, N_VOCAB)
    return float(np.exp(-model.log_probabilities(text).sum() / (len(text) - ORDER + 1)))


def routing_table(model: Transformer, dialogues: list[Row], texts: list[Row]) -> list[dict[str, float]]:
    """For each MoE layer over all rows: the least and most used expert against the mean, and how many of a token's
    experts the token before it used too; over the dialogues alone the share that the busiest quarter of experts
    carries inside one of them (mean and least)."""
    experts, active = model.c.n_routed_experts, model.c.num_experts_per_tok
    counts = np.zeros((len(model.moes), experts))
    quarter: list[list[float]] = [[] for _ in model.moes]
    reuse: list[list[float]] = [[] for _ in model.moes]
    for at, row in enumerate([*dialogues, *texts]):
        forward(model, row)
        for layer, moe in enumerate(model.moes):
            ids = moe.ids.numpy()
            used = np.bincount(ids.ravel(), minlength=experts)
            counts[layer] += used
            if at < len(dialogues):
                quarter[layer].append(np.sort(used)[-(experts // 4) :].sum() / used.sum())
            again = (ids[1:, :, None] == ids[:-1, None, :]).any(-1).mean()
            reuse[layer].append(float(again))
    return [
        {
            "layer": layer + model.c.first_k_dense_replace,
            "least_share": float(used.min() / used.sum()),
            "most_over_mean": float(used.max() / used.mean()),
            "top_quarter_in_dialogue": float(np.mean(quarter[layer])),
            "top_quarter_least": float(np.min(quarter[layer])),
            "lag1_reuse": float(np.mean(reuse[layer])),
            "chance_reuse": active / experts,
        }
        for layer, used in enumerate(counts)
    ]


@torch.no_grad()
def largest_logits(model: Transformer, rows: list[Row]) -> list[float]:
    """Of each layer the largest absolute attention logit of any head, over all positions of the rows."""
    largest = [0.0] * len(model.layers)
    for row in rows:
        ids, positions, documents, _ = (torch.from_numpy(part)[None] for part in row)
        model(ids, positions, documents, measure=True)
        found = [float(layer.self_attn.max_logits.max()) for layer in model.layers]
        largest = [max(pair) for pair in zip(largest, found, strict=True)]
    return largest


def load_rounded(state: Path, model: Transformer) -> Transformer:
    """The model of a training state, with the values that its export has."""
    from .export import round_like_export

    model.load_state_dict(torch.load(state, weights_only=True)["model"])
    round_like_export(model)
    return model.eval()
