"""Whether routed experts do what they were trained for: the loss of a text once as it is, and with the routing changed.

A trained model needs its routed experts, those that its routers chose, at the weight that its config gives them. So it
must get worse without them, worse with others, and not better with less or more of them. This needs no other model to
compare with. Invariant: the variants are read side by side, so that each expert is read once for all of them.
Shapes: T tokens, K active of E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from k2lite.backends.base import Backend, RoutingRule
from k2lite.engine import Chunk, Engine
from k2lite.quant.types import QuantTensor

from .reading import CHUNK_TOKENS, Progress, losses_of

Choice = tuple[torch.Tensor, torch.Tensor]  # ids int64 [T, K] ascending, weights float32 [T, K]
LESS, MORE = 0.6, 1 / 0.6


def _others(choice: Choice, n_experts: int) -> Choice:
    """Half way round the circle of experts."""
    ids, order = ((choice[0] + n_experts // 2) % n_experts).sort(dim=1)
    return ids, choice[1].gather(1, order)


def _none(choice: Choice) -> Choice:
    """The lowest ids, without weight: few experts are read."""
    return torch.arange(choice[0].shape[1], device=choice[0].device).expand_as(choice[0]), torch.zeros_like(choice[1])


@dataclass(frozen=True)
class Changed:
    """Nats a token: the loss under a variant, by how much it is above the loss as it is, and the standard error of
    that difference."""

    loss: float
    change: float
    error: float


VARIANTS: dict[str, Callable[[Choice, int], Choice]] = {
    "as_it_is": lambda choice, _: choice,
    "without_experts": lambda choice, _: _none(choice),
    "other_experts": _others,
    "less_of_them": lambda choice, _: (choice[0], choice[1] * LESS),
    "more_of_them": lambda choice, _: (choice[0], choice[1] * MORE),
}


def probe(engine: Engine, ids: Sequence[int], progress: Progress) -> dict[str, Changed]:
    """The same text under each variant. `progress` hears the tokens done."""
    step = max(1, min(CHUNK_TOKENS, engine.placement.prefill_chunk_tokens) // len(VARIANTS))
    sequences = [engine.open(len(ids)) for _ in VARIANTS]
    losses: list[list[npt.NDArray[np.float64]]] = [[] for _ in VARIANTS]
    try:
        with _side_by_side(engine.backend):
            for at in range(0, len(ids), step):
                part = ids[at : at + step]
                found = engine.step([Chunk(sequence, part, "all") for sequence in sequences])
                for mine, logits in zip(losses, found, strict=True):
                    mine.append(losses_of(logits, ids[at : at + step + 1]))
                progress(len(VARIANTS) * (at + len(part)), "routing changed")
    finally:
        for sequence in sequences:
            sequence.close()
    rows = np.stack([np.concatenate(mine) for mine in losses])  # [variants, T - 1]
    return {name: _changed(rows[0], mine) for name, mine in zip(VARIANTS, rows, strict=True)}


def _changed(own: npt.NDArray[np.float64], losses: npt.NDArray[np.float64]) -> Changed:
    difference = losses - own
    error = float(difference.std(ddof=1) / np.sqrt(len(own))) if len(own) > 1 else np.inf
    return Changed(float(losses.mean()), float(difference.mean()), error)


@contextmanager
def _side_by_side(backend: Backend) -> Iterator[None]:
    """Within, a batch is as many equal parts as there are variants, one behind another."""
    choose = backend.router

    def router(x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule) -> Choice:
        ids, weights = choose(x, weight, bias, rule)
        size = len(x) // len(VARIANTS)
        parts = [
            change((ids[number * size :][:size], weights[number * size :][:size]), weight.shape[0])
            for number, change in enumerate(VARIANTS.values())
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    backend.router = router  # type: ignore[method-assign]
    try:
        yield
    finally:
        backend.router = choose  # type: ignore[method-assign]
