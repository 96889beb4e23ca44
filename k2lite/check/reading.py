"""Has a model read the three texts: how likely each was to it, what its routers chose, and how fast it went.

Invariant: each text is read from an empty context, in chunks, so that any memory budget will do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import numpy.typing as npt
import torch

from k2lite.benchmark import Phase, phase, snapshot
from k2lite.engine import Chunk, Engine
from k2lite.evaluation import score_window
from k2lite.offload.recording import RoutingRecorder

TEXTS = ("english", "python", "chinese")
# Rows of logits at one time: 335 MB for K2's vocabulary.
CHUNK_TOKENS = 512
# Of the adaptive model below: what an unseen token counts.
UNSEEN = 0.05

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class TextScore:
    """`bits_per_byte` is the model's, `unigram_bits_per_byte` that of a model which knows nothing but how often each
    token came so far. `nbytes` are those of the tokens that were scored."""

    name: str
    tokens: int
    nbytes: int
    perplexity: float
    bits_per_byte: float
    unigram_bits_per_byte: float

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / self.tokens


@dataclass(frozen=True, eq=False)
class Reading:
    """`ids` uint16 and `weights` float16 [T, L, K] are the routers' choices for all texts, one after another."""

    scores: tuple[TextScore, ...]
    ids: npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16]
    prefill: Phase


def text(name: str) -> str:
    return (files("k2lite.check") / f"{name}.txt").read_text(encoding="utf-8")


def encoded(engine: Engine, most_tokens: int) -> dict[str, list[int]]:
    """The first `most_tokens` of each text."""
    return {name: engine.tokenizer.encode(text(name))[:most_tokens] for name in TEXTS}


def read_texts(engine: Engine, texts: dict[str, list[int]], progress: Progress) -> Reading:
    """Score each text; `progress` hears the tokens done."""
    recorder = RoutingRecorder(engine.config.moe_layers)
    before = engine.experts.observers
    engine.experts.observers = (*before, recorder.observe)
    scores, phases, done = [], [], 0
    try:
        for name, ids in texts.items():
            losses, phases_of_text = read_text(engine, ids)
            phases += phases_of_text
            scores.append(_score(engine, name, ids, losses))
            done += len(ids)
            progress(done, f"read {name}")
    finally:
        engine.experts.observers = before
    chosen, weights = recorder.arrays()
    return Reading(tuple(scores), chosen, weights, sum_of(phases))


def read_text(engine: Engine, ids: Sequence[int]) -> tuple[npt.NDArray[np.float64], list[Phase]]:
    """The loss in nats of each token but the first, [T - 1], and what each chunk took."""
    most = min(CHUNK_TOKENS, engine.placement.prefill_chunk_tokens)
    losses, phases = [], []
    with engine.open(len(ids)) as sequence:
        for at in range(0, len(ids), most):
            part = ids[at : at + most]
            before = snapshot(engine)
            (logits,) = engine.step([Chunk(sequence, part, "all")])
            phases.append(phase(engine, before, len(part)))
            losses.append(losses_of(logits, ids[at : at + most + 1]))
    return np.concatenate(losses), phases


def losses_of(logits: torch.Tensor, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Losses of ids[1:] by the rows of `logits` [n, vocab]; the last row is unused if it has nothing to foretell."""
    return score_window(ids, logits[: len(ids) - 1], None)[0] if len(ids) > 1 else np.empty(0)


def sum_of(phases: Sequence[Phase]) -> Phase:
    names = Phase.__dataclass_fields__
    return Phase(**{name: sum(getattr(item, name) for item in phases) for name in names})


def _score(engine: Engine, name: str, ids: list[int], losses: npt.NDArray[np.float64]) -> TextScore:
    nbytes = sum(len(engine.tokenizer.token_bytes(token)) for token in ids[1:])
    mean = float(losses.mean())
    return TextScore(
        name=name,
        tokens=len(ids) - 1,
        nbytes=nbytes,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=float(losses.sum()) / math.log(2) / nbytes,
        unigram_bits_per_byte=_unigram_loss(ids[1:], engine.config.vocab_size) / math.log(2) / nbytes,
    )


def _unigram_loss(ids: Sequence[int], vocabulary: int) -> float:
    """Nats of a text under counts of what came before in it, every token of the vocabulary begun with UNSEEN."""
    counts: Counter[int] = Counter()
    loss = 0.0
    for number, token in enumerate(ids):
        loss -= math.log((counts[token] + UNSEEN) / (number + UNSEEN * vocabulary))
        counts[token] += 1
    return loss
