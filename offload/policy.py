"""What a cache policy is, and the bookkeeping that all of them share.

Invariant: a policy only orders what is resident; it holds no bytes and no slots, and what it says changes speed, never
tokens. Experts are (layer index, expert), the index counting MoE layers from 0. All times are counted in tokens that a
layer has routed, so within a layer the order of experts changes only when that layer is observed: the worst of each
layer is kept, and a victim costs a look at one number a layer.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
State = dict[str, npt.NDArray[np.generic]]

# What a saved long-run count is worth in a new conversation (facts: a full count carries the old topic over).
NEW_CONVERSATION = 0.25


class Policy(Protocol):
    """Who leaves when a slot is needed. One thread at a time calls it."""

    name: ClassVar[str]

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None: ...

    def observe(self, layer_index: int, ids: Sequence[int]) -> None:
        """One token's choice in one layer, all experts of it at once, in time order."""

    def admit(self, layer_index: int, expert: int, *, ahead: bool = True) -> None:
        """The expert is resident from now on: it was missed, or prefetched. Not `ahead`: it came back from a nearer
        tier, and nobody expects it."""

    def victim(self, leased: Container[tuple[int, int]]) -> tuple[int, int]:
        """The resident (layer index, expert) to evict, never one in `leased`. Does not evict it. RuntimeError where
        everything resident is leased."""

    def evict(self, layer_index: int, expert: int) -> None:
        """The expert is no longer resident."""

    def urgency(self, experts: Sequence[tuple[int, int]]) -> Array:
        """How far the next use of each (layer index, expert) is, resident or not: the largest leaves first. [n]"""

    def state(self) -> State:
        """What was learned, without who is resident."""

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Begin a new conversation with what was learned before. ValueError where the shapes are another model's."""


class KeyedPolicy(ABC):
    """A policy that gives each expert a key: in a layer the smallest leaves first; `urgency` compares layers.

    An expert that is admitted though its layer's last token did not choose it was fetched ahead: until the layer's
    next token it counts as CERTAIN to be used."""

    name: ClassVar[str]
    CERTAIN: ClassVar[float] = 1e300

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:
        n_layers = len(layers)
        if n_layers < 1 or n_experts < 1 or slots < 1:
            raise ValueError(f"{n_layers} layers, {n_experts} experts and {slots} slots: each must be 1 or more")
        self.shape = (n_layers, n_experts)
        self.slots = slots
        self.current = n_layers - 1  # the layer that was observed last
        self._keys = np.zeros(self.shape)
        self._resident = np.zeros(self.shape, dtype=np.bool_)
        self._chosen = np.zeros(self.shape, dtype=np.bool_)  # by the layer's last token
        self._expected = np.zeros(self.shape, dtype=np.bool_)
        self._candidates = np.full(self.shape, np.inf)  # keys of those resident
        self._worst = np.full(n_layers, np.inf)
        self._worst_expert = np.zeros(n_layers, dtype=np.int64)
        self._stale: set[int] = set()
        steps = (np.arange(n_layers)[None] - np.arange(n_layers)[:, None]) % n_layers
        self._distances = np.where(steps == 0, n_layers, steps).astype(np.float64)

    @abstractmethod
    def _update(self, layer_index: int, ids: Sequence[int]) -> None:
        """Learn one choice and renew the layer's row of `_keys`."""

    def _urgency(self, keys: Array, distances: Array) -> Array:
        """How badly experts with these keys, so far from their layer's turn, should go: the largest goes. A layer with
        nothing resident has the key infinity and must come below all others. Equal keys: the layer that comes last."""
        return distances * 1e-9 - keys

    def urgency(self, experts: Sequence[tuple[int, int]]) -> Array:
        rows, columns = np.array(experts, dtype=np.int64).reshape(-1, 2).T
        return self._urgency(self._keys[rows, columns], self.distances[rows])

    @property
    def distances(self) -> Array:
        """Layer steps to each layer's next turn, [L]: 1 for the next one, L for the one just observed."""
        row: Array = self._distances[self.current]
        return row

    def observe(self, layer_index: int, ids: Sequence[int]) -> None:
        self.current = layer_index
        chosen = self._chosen[layer_index]
        chosen[:] = False
        chosen[np.asarray(ids)] = True
        self._expected[layer_index] = False
        self._update(layer_index, ids)
        self._candidates[layer_index] = np.where(self._resident[layer_index], self._keys[layer_index], np.inf)
        self._stale.add(layer_index)

    def admit(self, layer_index: int, expert: int, *, ahead: bool = True) -> None:
        at = layer_index, expert
        if self._resident[at]:
            raise ValueError(f"layer index {layer_index}, expert {expert} is resident already")
        self._resident[at] = True
        self._expected[at] = ahead and not self._chosen[at]
        self._candidates[at] = self.CERTAIN if self._expected[at] else self._keys[at]
        self._stale.add(layer_index)

    def evict(self, layer_index: int, expert: int) -> None:
        at = layer_index, expert
        if not self._resident[at]:
            raise ValueError(f"layer index {layer_index}, expert {expert} is not resident")
        self._resident[at] = self._expected[at] = False
        self._candidates[at] = np.inf
        if self._worst_expert[layer_index] == expert:
            self._stale.add(layer_index)

    def victim(self, leased: Container[tuple[int, int]]) -> tuple[int, int]:
        for layer_index in self._stale:
            self._refresh(layer_index)
        self._stale.clear()
        worst, experts = self._worst, self._worst_expert
        while True:
            urgency = self._urgency(worst, self.distances)
            layer_index = int(urgency.argmax())
            if worst[layer_index] == np.inf:
                raise RuntimeError("no expert can be evicted: all that are resident are leased")
            found = layer_index, int(experts[layer_index])
            if found not in leased:
                return found
            if worst is self._worst:
                worst, experts = worst.copy(), experts.copy()
            worst[layer_index], experts[layer_index] = self._worst_of(layer_index, leased)

    def state(self) -> State:
        return {}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Nothing is learned that would outlive a conversation."""
        if state:
            raise ValueError(f"policy {self.name} keeps no statistics, found {', '.join(sorted(state))}")

    def _refresh(self, layer_index: int) -> None:
        row = self._candidates[layer_index]
        expert = int(row.argmin())
        self._worst[layer_index], self._worst_expert[layer_index] = row[expert], expert

    def _worst_of(self, layer_index: int, leased: Container[tuple[int, int]]) -> tuple[float, int]:
        """The smallest key of a layer that is not leased, and whose it is; infinity where there is none."""
        row = self._candidates[layer_index]
        for expert in np.argsort(row, kind="stable").tolist():
            if row[expert] == np.inf or (layer_index, expert) not in leased:
                return float(row[expert]), expert
        return np.inf, 0


def restored(state: Mapping[str, npt.NDArray[np.generic]], name: str, shape: tuple[int, ...]) -> Array:
    """A saved array as a float64 copy. Raises ValueError where it is missing or of another shape or not finite."""
    if name not in state:
        raise ValueError(f"the saved statistics have no {name!r}")
    array = np.array(state[name], dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"the saved {name} has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"the saved {name} holds NaN or infinity")
    return array
