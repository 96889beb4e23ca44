"""An expert that has a slot in RAM, and the view of all of them that a policy is given when it looks for a victim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2lite.quant.types import ExpertKey, ExpertWeights

from .store import ExpertRead


@dataclass(eq=False)
class Held:
    """An expert that has a slot: on its way while `read` is set, readable once `weights` is. `pins` counts leases."""

    key: ExpertKey
    slot: int
    in_ring: bool
    read: ExpertRead | None = None
    weights: ExpertWeights | None = None
    error: Exception | None = None
    pins: int = 0
    is_guess: bool = False  # read on a guess and not asked for since


class Leased:
    """The experts that may not be evicted, as (row of the layer, expert)."""

    def __init__(self, table: Mapping[ExpertKey, Held], layers: Sequence[int]) -> None:
        self._table = table
        self._layers = layers

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple):
            return False
        held = self._table.get(ExpertKey(self._layers[item[0]], item[1]))
        return held is not None and held.pins > 0
