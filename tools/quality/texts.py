"""What rules for rounding are calibrated on and what they are judged on: held-out text and dialogues for the second,
training text and training-style dialogues of another seed for the first."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from k2lite.text.tokenizer import Tokenizer
from tools.demo_training.batches import Row
from tools.demo_training.evaluation import Turn, held_out_turns
from tools.demo_training.tools_data import tool_dialogue

WINDOW = 512
ROW_TOKENS = 2048
CALIBRATION_SEED = "calibration of rounding"


@dataclass(frozen=True)
class Judged:
    """Documents (token ids) to score, the first `texts` of them text and the rest dialogues with their turns."""

    documents: list[list[int]]
    texts: int
    turns: list[Turn]


def judged(tokenizer: Tokenizer, work: Path, text_tokens: int, dialogues: int) -> Judged:
    held_out = np.load(work / "held_out.npy")[:text_tokens].tolist()
    texts = [held_out[at : at + WINDOW] for at in range(0, len(held_out) - 1, WINDOW)]
    turns = held_out_turns(tokenizer, dialogues, questions=0)
    spoken = list({id(turn.ids): turn.ids for turn in turns}.values())
    return Judged([*texts, *spoken], len(texts), turns)


def calibration(tokenizer: Tokenizer, work: Path, tokens: int, dialogue_share: float) -> list[Row]:
    """Rows of about `tokens` tokens in all."""
    rng = random.Random(CALIBRATION_SEED)
    train = np.load(work / "train.npy")
    documents: list[list[int]] = []
    read = 0
    while read < tokens:
        if rng.random() < dialogue_share:
            made = tool_dialogue(rng, held_out=False)
            ids = tokenizer.render(made.messages, made.tools, add_generation_prompt=False).ids
        else:
            at = rng.randrange(len(train) - WINDOW)
            ids = train[at : at + WINDOW].tolist()
        documents.append(ids)
        read += len(ids)
    return packed(documents)


def packed(documents: list[list[int]]) -> list[Row]:
    """Documents on end in rows of about ROW_TOKENS, in order; each sees itself only."""
    rows: list[list[list[int]]] = [[]]
    for ids in documents:
        if sum(map(len, rows[-1])) >= ROW_TOKENS:
            rows.append([])
        rows[-1].append(ids)
    return [_row(row) for row in rows]


def _row(documents: list[list[int]]) -> Row:
    ids = np.concatenate([np.array(one, dtype=np.int64) for one in documents])
    positions = np.concatenate([np.arange(len(one)) for one in documents])
    numbers = np.repeat(np.arange(len(documents)), [len(one) for one in documents])
    return ids, positions, numbers, np.ones(len(ids))
