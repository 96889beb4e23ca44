"""Perplexity of a model on token windows, and how far a second model is from it: KL divergence, top-1 agreement.

Invariant: every window starts from an empty context, so a token's score depends on its own window only; the first
token of a window has nothing before it and is not scored. One window's logits are held at a time, float32
[T, V] of each model; sums are float64 over the whole vocabulary. Deals in ids, knows no text and no files.
Shapes: T tokens of a window, V vocabulary, W windows, M measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from k2lite.quant.errors import K2LiteError, RequestError

if TYPE_CHECKING:
    from .engine import Engine

Array = npt.NDArray[np.float64]

# Rows of logits that are float64 at one time: 42 MB for K2's vocabulary.
ROWS = 32
RESAMPLES = 2000
BOOTSTRAP_SEED = 0
INTERVAL_PERCENT = 95.0


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval; there is none (None) where there is one window only."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured, in natural logarithms. The last three are None where there is no second model."""

    windows: int
    scored_tokens: int
    perplexity_a: Estimate
    perplexity_b: Estimate | None = None
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None


def split_windows(ids: Sequence[int], window: int) -> list[Sequence[int]]:
    """The ids in windows one after another, without overlap. The last may be shorter; one token alone can't be scored
    and is left out. Raises RequestError where nothing is left."""
    if window < 2:
        raise RequestError(f"a window of {window} tokens has none to score; expected 2 or more")
    windows = [ids[at : at + window] for at in range(0, len(ids), window)]
    if windows and len(windows[-1]) < 2:
        windows.pop()
    if not windows:
        raise RequestError(f"the text has {len(ids)} tokens; at least 2 are needed, since the first is not scored")
    return windows


def check_same_vocabulary(a: Engine, b: Engine) -> None:
    """Raise RequestError unless the same id means the same token to both: else their probabilities can't be
    compared."""
    if a.config.vocab_size != b.config.vocab_size:
        raise RequestError(f"A has a vocabulary of {a.config.vocab_size} and B one of {b.config.vocab_size}")
    ours, theirs = a.tokenizer, b.tokenizer
    if ours.n_vocab != theirs.n_vocab:
        raise RequestError(f"the tokenizer of A has {ours.n_vocab} tokens and that of B {theirs.n_vocab}")
    for token in range(ours.n_vocab):
        if ours.token_bytes(token) != theirs.token_bytes(token):
            raise RequestError(
                f"token {token} is {ours.token_bytes(token)!r} in A and {theirs.token_bytes(token)!r} in B: "
                "the two have different tokenizers"
            )


def evaluate(
    a: Engine, b: Engine | None, windows: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Score all windows with A, and with B where there is one; `progress` gets the number of windows done."""
    sums, counts = [], []
    for done, ids in enumerate(windows, 1):
        logits_b = None if b is None else b.logits(ids)
        scores = score_window(ids, a.logits(ids), logits_b)
        if not np.isfinite(scores).all():
            raise K2LiteError(f"window {done} of {len(windows)}: the logits hold NaN or infinity")
        sums.append(scores.sum(axis=1))
        counts.append(scores.shape[1])
        if progress is not None:
            progress(done)
    return summarize(np.array(sums), np.array(counts, dtype=np.float64))


def score_window(ids: Sequence[int], logits_a: torch.Tensor, logits_b: torch.Tensor | None) -> Array:
    """Scores [M, T - 1] from logits [T, V] of the window's ids; row t predicts token t + 1, so the last is unused.
    The measures: the loss of A, and where there is a B its loss, KL(A||B), and whether both like one token best."""
    targets = torch.tensor(ids[1:], dtype=torch.int64)
    parts = []
    for at in range(0, len(targets), ROWS):
        rows = slice(at, min(at + ROWS, len(targets)))
        chosen = targets[rows, None]
        log_a = _log_softmax(logits_a[rows])
        measures = [-log_a.gather(1, chosen)[:, 0]]
        if logits_b is not None:
            log_b = _log_softmax(logits_b[rows])
            measures.append(-log_b.gather(1, chosen)[:, 0])
            measures.append((log_a.exp() * (log_a - log_b)).sum(dim=1))
            # of the logits themselves: rounding on the way must not make a tie
            agree = logits_a[rows].argmax(dim=1).cpu() == logits_b[rows].argmax(dim=1).cpu()
            measures.append(agree.to(torch.float64))
        parts.append(torch.stack(measures))
    scores: Array = torch.cat(parts, dim=1).numpy()
    return scores


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.to("cpu", torch.float64), dim=1)


def summarize(sums: Array, counts: Array) -> Evaluation:
    """From the windows' sums [W, M] and numbers of scored tokens [W] to means per token with intervals. M is 1 (A
    alone) or 4, in the order of `score_window`."""
    means = sums.sum(axis=0) / counts.sum()
    low, high = bootstrap_interval(sums, counts) if len(counts) > 1 else (None, None)

    def mean(measure: int) -> Estimate:
        if low is None or high is None:
            return Estimate(float(means[measure]), None, None)
        return Estimate(float(means[measure]), float(low[measure]), float(high[measure]))

    compared = sums.shape[1] > 1
    return Evaluation(
        windows=len(counts),
        scored_tokens=int(counts.sum()),
        perplexity_a=_exp(mean(0)),
        perplexity_b=_exp(mean(1)) if compared else None,
        kl=mean(2) if compared else None,
        top1_agreement=mean(3) if compared else None,
    )


def _exp(loss: Estimate) -> Estimate:
    """Perplexity is the exponential of the mean loss; quantiles go with it, since it never falls."""
    low, high = (None if bound is None else float(np.exp(bound)) for bound in (loss.low, loss.high))
    return Estimate(float(np.exp(loss.value)), low, high)


def bootstrap_interval(
    sums: Array, counts: Array, *, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> tuple[Array, Array]:
    """Percentile interval of the means per token, [M] each: whole windows are drawn with replacement, since the
    tokens of a window depend on one another (block bootstrap: Efron and Tibshirani 1993, section 8.6)."""
    random = np.random.default_rng(seed)
    means = np.empty((resamples, sums.shape[1]))
    for at in range(resamples):
        drawn = random.integers(len(counts), size=len(counts))
        means[at] = sums[drawn].sum(axis=0) / counts[drawn].sum()
    tail = (100 - INTERVAL_PERCENT) / 2
    low, high = np.percentile(means, (tail, 100 - tail), axis=0)
    return low, high
