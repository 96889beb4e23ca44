"""Policies of the field that look at each expert alone: LRU, LFU with decay, LFRU, and a static set.

Invariant: keys are renewed for a whole layer when it is observed. They don't know that layers come in a cycle, except
to break ties. Source: facts of the field, routing.md section 3. Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .policy import NEW_CONVERSATION, KeyedPolicy, State, restored


class LeastRecentlyUsed(KeyedPolicy):
    """The key is the time of the last use. Below one token's experts it hits nothing: access is a cyclic scan."""

    name: ClassVar[str] = "lru"

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:
        super().__init__(layers, n_experts, slots)
        self._clock = 0

    def _update(self, layer_index: int, ids: Sequence[int]) -> None:
        self._clock += 1
        self._keys[layer_index, np.asarray(ids)] = self._clock

    def admit(self, layer_index: int, expert: int, *, ahead: bool = True) -> None:
        """Fetching ahead counts as a use."""
        if ahead and not self._chosen[layer_index, expert]:
            self._keys[layer_index, expert] = self._clock
        super().admit(layer_index, expert, ahead=ahead)
        self._candidates[layer_index, expert] = self._keys[layer_index, expert]


class LeastFrequentlyUsed(KeyedPolicy):
    """The key is a use count that halves every HALF_LIFE tokens."""

    name: ClassVar[str] = "lfu"
    HALF_LIFE: ClassVar[float] = 32.0

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:
        super().__init__(layers, n_experts, slots)
        self._decay = 0.5 ** (1 / self.HALF_LIFE)

    def _update(self, layer_index: int, ids: Sequence[int]) -> None:
        row = self._keys[layer_index]
        row *= self._decay
        row[np.asarray(ids)] += 1

    def state(self) -> State:
        return {"counts": self._keys.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self._keys[:] = restored(state, "counts", self.shape) * NEW_CONVERSATION


class FrequencyOverAge(KeyedPolicy):
    """LFRU: the key is the use count over the tokens since the last use, that one included."""

    name: ClassVar[str] = "lfru"

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:
        super().__init__(layers, n_experts, slots)
        self._counts = np.zeros(self.shape)
        self._age = np.ones(self.shape)

    def _update(self, layer_index: int, ids: Sequence[int]) -> None:
        counts, age, chosen = self._counts[layer_index], self._age[layer_index], np.asarray(ids)
        age += 1
        age[chosen] = 1
        counts[chosen] += 1
        np.divide(counts, age, out=self._keys[layer_index])

    def state(self) -> State:
        return {"counts": self._counts.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """What was used in another conversation counts less and is as old as it can be here."""
        self._counts[:] = restored(state, "counts", self.shape) * NEW_CONVERSATION
        self._age[:] = 1
        self._keys[:] = self._counts


class StaticSet(KeyedPolicy):
    """The key is a use count that is frozen: taken from saved statistics, or from the first LEARN_TOKENS tokens. What
    is not in the set passes through the slots that are left."""

    name: ClassVar[str] = "static"
    LEARN_TOKENS: ClassVar[int] = 64

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:
        super().__init__(layers, n_experts, slots)
        self._left = np.full(self.shape[0], self.LEARN_TOKENS)

    def _update(self, layer_index: int, ids: Sequence[int]) -> None:
        if self._left[layer_index]:
            self._left[layer_index] -= 1
            self._keys[layer_index, np.asarray(ids)] += 1

    def state(self) -> State:
        return {"counts": self._keys.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self._keys[:] = restored(state, "counts", self.shape)
        self._left[:] = 0
