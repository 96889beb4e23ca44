"""Which expert to evict: pure decisions on numbers. A policy never sees a byte, a slot or a clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from k2lite.quant.errors import RequestError

State = dict[str, npt.NDArray[np.float64]]


class Policy(Protocol):
    """Layers are numbered by their place in `layers`, experts as in the model."""

    name: str

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None: ...

    def observe(self, layer_index: int, ids: Sequence[int]) -> None: ...

    def admit(self, layer_index: int, expert: int) -> None: ...

    def victim(self, leased: Container[tuple[int, int]]) -> tuple[int, int]: ...

    def evict(self, layer_index: int, expert: int) -> None: ...

    def prefers(self, layer_index: int, expert: int, over: tuple[int, int]) -> bool: ...

    def state(self) -> State: ...

    def restore(self, state: Mapping[str, npt.NDArray[np.float64]]) -> None: ...


class LeastRecentlyUsed:
    """The least recently used."""

    name = "lru"

    def __init__(self, layers: Sequence[int], n_experts: int, slots: int) -> None:  # noqa: ARG002
        self._resident: OrderedDict[tuple[int, int], None] = OrderedDict()

    def observe(self, layer_index: int, ids: Sequence[int]) -> None:
        for expert in ids:
            if (layer_index, expert) in self._resident:
                self._resident.move_to_end((layer_index, expert))

    def admit(self, layer_index: int, expert: int) -> None:
        self._resident[layer_index, expert] = None

    def victim(self, leased: Container[tuple[int, int]]) -> tuple[int, int]:
        return next(key for key in self._resident if key not in leased)

    def evict(self, layer_index: int, expert: int) -> None:
        del self._resident[layer_index, expert]

    def prefers(self, layer_index: int, expert: int, over: tuple[int, int]) -> bool:  # noqa: ARG002
        return True

    def state(self) -> State:
        return {}

    def restore(self, state: Mapping[str, npt.NDArray[np.float64]]) -> None:
        pass


POLICIES: dict[str, type[Policy]] = {"lru": LeastRecentlyUsed}
DEFAULT_POLICY = "lru"


def make_policy(name: str, layers: Sequence[int], n_experts: int, slots: int) -> Policy:
    """A policy for `slots` slots over all of `layers` together. Raises RequestError for an unknown name."""
    if name not in POLICIES:
        raise RequestError(f"policy {name!r} is unknown; there are {', '.join(POLICIES)}")
    return POLICIES[name](layers, n_experts, slots)
