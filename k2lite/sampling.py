"""From logits to one token: temperature, top-k, top-p, min-p, then a draw that depends on seed and position only.

Filters apply in vLLM's order (temperature first) and ties go to the lowest id, so a choice is reproducible on any
machine that has the same logits. Knows no text; a grammar plugs in as `mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from k2lite.quant.errors import K2LiteError, RequestError

SECOND_DRAW = 1 << 63  # seeds of clients rarely differ in this bit


class Token(int):
    """A token id that remembers how it was chosen: `logprob` under the model before any filter (natural log), and
    whether it ends the answer."""

    logprob: float
    is_stop: bool

    def __new__(cls, token_id: int, *, logprob: float, is_stop: bool = False) -> Token:
        token = super().__new__(cls, token_id)
        token.logprob = logprob
        token.is_stop = is_stop
        return token


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy and ignores the rest; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.6  # Moonshot's recommendation for K2-Instruct and 0905
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "greater than 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed, 0 <= self.seed < 1 << 64, "from 0 to 2^64 - 1"),
        )
        for name, value, good, expected in checks:
            if not good:
                raise RequestError(f"{name} is {value}; expected {expected}")


def sample(logits: torch.Tensor, params: SamplingParams, position: int, mask: torch.Tensor | None = None) -> Token:
    """Choose a token from logits float32 [vocab]. `position` is the new token's place in its sequence; `mask` is
    bool [vocab], true where a token is allowed.

    Raises K2LiteError where a logit is NaN or all are -inf: broken numbers must not become text."""
    values = logits.detach().to("cpu", torch.float64).numpy()
    if np.isnan(values).any() or np.isposinf(values).any():
        raise K2LiteError(
            f"the model's output at position {position} holds NaN or infinity; the weights or a kernel are damaged "
            "(k2lite info MODEL checks the files)"
        )
    all_logprobs = _log_softmax(values)
    allowed = values if mask is None else np.where(mask.numpy(), values, -np.inf)
    if np.isneginf(allowed).all():
        raise K2LiteError(f"no token is possible at position {position}: every logit is -inf or masked")
    chosen = int(np.argmax(allowed)) if params.temperature == 0 else _draw(allowed, params, position)
    return Token(chosen, logprob=float(all_logprobs[chosen]))


def sample_allowed(
    logits: torch.Tensor,
    params: SamplingParams,
    position: int,
    allows: Callable[[int], bool],
    mask: Callable[[], torch.Tensor],
) -> Token:
    """Like `sample` under `mask`, which is made only where a free draw gives a token that it does not have (`allows`).
    The second draw is independent of the first, so tokens come as often as under the mask; filters see all tokens
    first."""
    token = sample(logits, params, position)
    if allows(token):
        return token
    return sample(logits, replace(params, seed=params.seed ^ SECOND_DRAW), position, mask())


def _draw(logits: npt.NDArray[np.float64], params: SamplingParams, position: int) -> int:
    order = np.argsort(-logits, kind="stable")
    with np.errstate(over="ignore"):  # a temperature near 0 may make -inf of a difference, which is right
        scaled = (logits[order] - logits[order[0]]) / params.temperature
    probabilities = np.exp(_log_softmax(scaled))
    keep = len(order) if params.top_k == 0 else min(params.top_k, len(order))
    # top-p keeps the token that crosses the threshold, so at least one stays
    before = np.cumsum(probabilities) - probabilities
    keep = min(keep, int(np.count_nonzero(before < params.top_p)))
    keep = min(keep, int(np.count_nonzero(probabilities >= params.min_p * probabilities[0])))
    cumulative = np.cumsum(probabilities[:keep])
    point = _uniform(params.seed, position) * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, point, side="right")), keep - 1)])


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a counter-based generator: the same for the same seed and position, whatever was
    drawn before."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _log_softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = values - values.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
