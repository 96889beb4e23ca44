"""Policies that estimate when an expert is needed next, knowing that layers come in a cycle.

With p the probability that a layer's next token uses an expert and d the layer steps to that layer's turn, the expected
next use is N = d + L (1 - p) / p layer steps away; the largest N leaves. They differ in how they find p.
Source: routing.md section 3. Shapes: L MoE layers, E experts, K active experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .policy import NEW_CONVERSATION, Array, KeyedPolicy, State, restored
from .reuse_model import ReuseModel


class NextUsePolicy(KeyedPolicy):
    """The key of an expert is p."""

    CERTAIN: ClassVar[float] = 1.0

    @abstractmethod
    def _update(self, layer_index: int, ids: Sequence[int]) -> None: ...

    def _urgency(self, keys: Array, distances: Array) -> Array:
        n_layers = self.shape[0]
        return distances + (n_layers / keys - n_layers)


class TwoRateCyclic(NextUsePolicy):
    """p from two counts that halve every 3 and every 32 tokens: the mean of their rates and a tenth of K / E."""

    name: ClassVar[str] = "cyclic"
    HALF_LIVES: ClassVar[tuple[float, float]] = (3.0, 32.0)
    FLOOR: ClassVar[float] = 0.1

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:
        super().__init__(layers, n_experts, slots)
        self._decay = 0.5 ** (1 / np.array(self.HALF_LIVES))
        self._counts = np.zeros((self.shape[0], 2, self.shape[1]))
        self._keys[:] = self.FLOOR / n_experts  # before the first token: all alike

    def _update(self, layer_index: int, ids: Sequence[int]) -> None:
        counts = self._counts[layer_index]
        counts *= self._decay[:, None]
        counts[:, np.asarray(ids)] += 1
        self._keys[layer_index] = (1 - self._decay) @ counts / 2 + self.FLOOR * len(ids) / self.shape[1]

    def state(self) -> State:
        return {"counts": self._counts.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The short memory is of another conversation's last words; the long one is kept with less weight."""
        self._counts[:] = restored(state, "counts", self._counts.shape)
        self._counts[:, 0] = 0
        self._counts[:, 1] *= NEW_CONVERSATION
        rates = np.einsum("j,lje->le", 1 - self._decay, self._counts) / 2
        self._keys[:] = rates + self.FLOOR / self.shape[1]


class LearnedCyclic(NextUsePolicy):
    """p from a logistic regression on decayed rates that learns while it runs (reuse_model.py)."""

    name: ClassVar[str] = "hazard"

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:
        super().__init__(layers, n_experts, slots)
        self._model = ReuseModel(*self.shape)
        self._keys[:] = 1 / n_experts  # before the first token: all alike
        self._events = 0

    def _update(self, layer_index: int, ids: Sequence[int]) -> None:
        self._keys[layer_index] = self._model.observe(layer_index, ids)
        # once a token, in whatever order a batch's tokens come
        self._events += 1
        if self._events == self.shape[0]:
            self._events = 0
            self._model.step()

    def state(self) -> State:
        return self._model.state()

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self._model.restore(state)
        self._events = 0
        self._keys[:] = self._model.long_run_rates()
