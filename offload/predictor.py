"""Ranked guesses at what a layer will choose, for fetching ahead: the router's own guess first, statistics beside it.

The next layer's router, applied early by whoever has the hidden state, is the best guess there is; what it ranks at
place r is right as often as it was before at place r, which is counted here. Experts that it doesn't name share what is
left in the proportion of the statistics, which also break ties and serve alone where no router was asked.
Invariant: a guess changes when bytes are read, never which experts a token uses. Knows no slots.

Shapes: K active experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .policy import Array, State, restored
from .statistics import RouterStats

# How often the next router's guess at each rank was right for Kimi-K3 (routing.md 1.4: ranks 1, 4, 7, 10, 13, 16).
RANKS, PRECISION = (0, 3, 6, 9, 12, 15), (0.92, 0.80, 0.64, 0.53, 0.39, 0.28)
MAX_RANKS = 64
PSEUDO_GUESSES = 16.0
FORGET = 0.999  # of earlier guesses, per guess: about 700 count
DEFAULT_LIMIT = 16


class Predictor:
    """Guesses from `stats`, which someone else feeds."""

    def __init__(self, stats: RouterStats) -> None:
        self.stats = stats
        prior = np.interp(np.arange(MAX_RANKS), RANKS, PRECISION)
        prior[RANKS[-1] :] = PRECISION[-1] * 0.85 ** np.arange(MAX_RANKS - RANKS[-1])
        self._right = prior * PSEUDO_GUESSES
        self._asked = np.full(MAX_RANKS, PSEUDO_GUESSES)
        self._open: dict[int, list[int]] = {}  # the router's guess at a layer that has not chosen yet

    @property
    def precision(self) -> Array:
        """How often the router's guess at each rank is right, [MAX_RANKS]."""
        result: Array = self._right / self._asked
        return result

    def rank(
        self,
        layer_index: int,
        ids_of_previous_layer: Sequence[int] | None,
        router_ranked: Sequence[int] | None,
        *,
        limit: int = DEFAULT_LIMIT,
    ) -> list[int]:
        """At most `limit` experts of a layer, the likeliest first. `ids_of_previous_layer`: what the token used in
        layer_index - 1; `router_ranked`: what this layer's router would choose from an earlier hidden state, the best
        first."""
        return [expert for expert, _ in self.guesses(layer_index, ids_of_previous_layer, router_ranked, limit=limit)]

    def guesses(
        self,
        layer_index: int,
        ids_of_previous_layer: Sequence[int] | None,
        router_ranked: Sequence[int] | None,
        *,
        limit: int = DEFAULT_LIMIT,
    ) -> list[tuple[int, float]]:
        """The same with the probability that each is chosen."""
        likely = self.stats.reuse(layer_index)
        if ids_of_previous_layer is not None and layer_index > 0:
            likely = likely * self.stats.lift(layer_index, ids_of_previous_layer)
        top_k = max(self.stats.top_k, 1)
        likely = np.minimum(likely * (top_k / likely.sum()), 1.0)
        chance = likely
        if router_ranked is not None:
            named = list(router_ranked)[:MAX_RANKS]
            self._open[layer_index] = named
            precision = self.precision[: len(named)]
            chance = likely * max(0.0, 1 - float(precision.sum()) / top_k)
            chance[named] = precision
        order = np.lexsort((np.arange(len(likely)), -likely, -chance))[:limit].tolist()
        return [(expert, float(chance[expert])) for expert in order]

    def observe(self, layer_index: int, ids: Sequence[int]) -> None:
        """What the layer chose for the token whose guess is open: counts how the router's ranks did."""
        named = self._open.pop(layer_index, None)
        if named:
            right = np.isin(named, np.asarray(ids))
            self._right[: len(named)] = self._right[: len(named)] * FORGET + right
            self._asked[: len(named)] = self._asked[: len(named)] * FORGET + 1

    def state(self) -> State:
        return {"right": self._right.copy(), "asked": self._asked.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Raises ValueError where the arrays are not of `state`'s shape."""
        right = restored(state, "right", (MAX_RANKS,))
        asked = restored(state, "asked", (MAX_RANKS,))
        self._right, self._asked = right, np.maximum(asked, 1.0)
        self._open.clear()
