"""What the routers chose, counted as it happens. Knows layers and experts by number; no slots, no devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


class RouterStats:
    """Use counts of every routed expert: `counts` is int64 [number of MoE layers, E], in the order of `layers`."""

    def __init__(self, layers: Sequence[int], n_routed_experts: int) -> None:
        self.layers = tuple(layers)
        self.counts: npt.NDArray[np.int64] = np.zeros((len(self.layers), n_routed_experts), dtype=np.int64)
        self.weight_sums: npt.NDArray[np.float64] = np.zeros((len(self.layers), n_routed_experts), dtype=np.float64)
        self._row = {layer: row for row, layer in enumerate(self.layers)}

    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Add one batch: ids int64 [T, K], weights float32 [T, K]."""
        row, flat = self._row[layer], ids.cpu().numpy().ravel()
        np.add.at(self.counts[row], flat, 1)
        np.add.at(self.weight_sums[row], flat, weights.cpu().numpy().ravel())

    @property
    def distinct_experts(self) -> int:
        """Experts used at least once, over all layers."""
        return int(np.count_nonzero(self.counts))
