"""Rows of tokens for training: dialogues packed side by side, windows of text, and, in the beginning, runs of random
tokens said twice, all chosen by step number alone.

A step's batch depends on the seed and the step, so a run that was killed goes on with the very batches it would have
had. Text is learned everywhere; in a dialogue the assistant's turns count fully and the rest a little; of random tokens
only what is said again. They teach copying, which tool calls and look-ups are made of and dialogues alone teach slowly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from k2lite.text.tokenizer import Tokenizer

from . import words
from .questions import question
from .shape import TRAINED_TOKENS
from .tools_data import tool_dialogue

PROMPT_WEIGHT = 0.2
TEXT_SHARE = 0.2
COPY_SHARE = 0.25
COPY_STEPS = 200
# Of the rows of dialogues. A question is a tenth as long as a use of tools: mixed one by one it would get no room.
QUESTION_SHARE = 0.7
SHORT_TOKENS = 512
LONG_EVERY = 4


# ids, positions, documents, weights
Row = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """int64 [B, T] each, and the loss weight float32 [B, T] of predicting the token that follows."""

    ids: Tensor
    positions: Tensor
    documents: Tensor
    targets: Tensor
    weights: Tensor


def said_by_assistant(ids: list[int], special: Mapping[str, int]) -> list[bool]:
    """For each token of a rendered dialogue whether the assistant made it: behind its header, to its end of turn."""
    said, speaking, header = [], False, False
    for token in ids:
        said.append(speaking)
        if token == special["<|im_assistant|>"]:
            header = True
        elif token == special["<|im_middle|>"] and header:
            speaking, header = True, False
        elif token == special["<|im_end|>"]:
            speaking = False
    return said


def text_row(window: npt.NDArray[np.uint16]) -> Row:
    """A window of text as one document in which every token counts."""
    length = len(window)
    return window.astype(np.int64), np.arange(length), np.zeros(length, dtype=np.int64), np.ones(length)


def copy_row(rng: random.Random, length: int, tokens: Sequence[int]) -> Row:
    """Groups of one run of random `tokens` said two to four times with others in between; only what is said again, but
    for its first token, counts."""
    ids: list[int] = []
    positions: list[int] = []
    documents: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        run = rng.choices(tokens, k=rng.randint(3, 40))
        made, counted = run[:], [0.0] * len(run)
        for _ in range(rng.randint(1, 3)):
            between = rng.choices(tokens, k=rng.randint(1, 12))
            made += between + run
            counted += [0.0] * (len(between) + 1) + [1.0] * (len(run) - 1)
        documents += [documents[-1] + 1 if documents else 0] * len(made)
        ids, positions, weights = ids + made, [*positions, *range(len(made))], weights + counted
    return (
        np.array(ids[:length]),
        np.array(positions[:length]),
        np.array(documents[:length]),
        np.array(weights[:length]),
    )


def tokens_of_dialogues(tokenizer: Tokenizer) -> list[int]:
    """The tokens of what dialogues copy: names of tools and parameters, values, digits, made-up names."""
    rng = random.Random("copied")
    said = [*words.VERBS, *words.NOUNS, *words.PARAMETERS, *words.ENUM_VALUES, "0 1 2 3 4 5 6 7 8 9"]
    said += [words.word(rng, held_out=False) for _ in range(2000)]
    return sorted({token for text in said for token in tokenizer.encode(text)})


def some(rng: random.Random, count: float) -> int:
    """A whole number that is `count` on average."""
    return int(count + rng.random())


class Batches:
    """`text` is uint16 token ids of the training texts on end."""

    def __init__(self, tokenizer: Tokenizer, text: npt.NDArray[np.uint16], *, seed: int, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._seed = seed
        self._tokens = tokens
        self._copied = tokens_of_dialogues(tokenizer)

    def text_windows(self, step: int) -> list[npt.NDArray[np.uint16]]:
        """The windows of text in a step's batch, each one token longer than its row."""
        rng, length, rows = self._begin(step)
        return [self._window(rng, length) for _ in range(some(rng, rows * TEXT_SHARE))]

    def batch(self, step: int) -> Batch:
        rng, length, rows = self._begin(step)
        made = [text_row(self._window(rng, length)) for _ in range(some(rng, rows * TEXT_SHARE))]
        n_copies = some(rng, rows * COPY_SHARE) if step < COPY_STEPS else 0
        made += [copy_row(rng, length + 1, self._copied) for _ in range(n_copies)]
        n_questions = some(rng, (rows - len(made)) * QUESTION_SHARE)
        made += [self._dialogue_row(rng, length, self._question) for _ in range(n_questions)]
        made += [self._dialogue_row(rng, length, self._tool_use) for _ in range(rows - len(made))]
        ids, positions, documents, weights = (np.stack(parts) for parts in zip(*made, strict=True))
        # position t predicts token t + 1; the weight belongs to the token predicted
        same = documents[:, :-1] == documents[:, 1:]
        return Batch(
            ids=torch.from_numpy(ids[:, :-1]),
            positions=torch.from_numpy(positions[:, :-1]),
            documents=torch.from_numpy(documents[:, :-1]),
            targets=torch.from_numpy(ids[:, 1:]),
            weights=torch.from_numpy(weights[:, 1:] * same).float(),
        )

    def _begin(self, step: int) -> tuple[random.Random, int, int]:
        """A step's random numbers, its row length and its number of rows."""
        length = TRAINED_TOKENS if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_TOKENS
        return random.Random(f"{self._seed}:{step}"), length, max(1, self._tokens // length)

    def _window(self, rng: random.Random, length: int) -> npt.NDArray[np.uint16]:
        at = rng.randrange(len(self._text) - length - 1)
        return self._text[at : at + length + 1]

    def _dialogue_row(self, rng: random.Random, length: int, dialogue: Callable[[random.Random], list[int]]) -> Row:
        ids: list[int] = []
        positions: list[int] = []
        documents: list[int] = []
        weights: list[float] = []
        number = 0
        while len(ids) < length + 1:
            made = dialogue(rng)
            said = said_by_assistant(made, self._tokenizer.special_tokens)
            ids += made
            positions += range(len(made))
            documents += [number] * len(made)
            weights += [1.0 if own else PROMPT_WEIGHT for own in said]
            number += 1
        cut = length + 1
        return np.array(ids[:cut]), np.array(positions[:cut]), np.array(documents[:cut]), np.array(weights[:cut])

    def _tool_use(self, rng: random.Random) -> list[int]:
        made = tool_dialogue(rng, held_out=False)
        return self._tokenizer.render(made.messages, made.tools, add_generation_prompt=False).ids

    def _question(self, rng: random.Random) -> list[int]:
        asked = question(rng, held_out=False)
        messages = [{"role": "user", "content": asked.question}, {"role": "assistant", "content": asked.answer}]
        return self._tokenizer.render(messages, None, add_generation_prompt=False).ids


def encode_texts(tokenizer: Tokenizer, texts: list[str], path: Path) -> npt.NDArray[np.uint16]:
    """Token ids of all texts on end, kept in `path` for the next start."""
    if not path.is_file():
        ids = [np.array(tokenizer.encode(text), dtype=np.uint16) for text in texts]
        np.save(path, np.concatenate(ids))
    loaded: npt.NDArray[np.uint16] = np.load(path)
    return loaded
