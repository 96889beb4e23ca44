"""What the routers chose, counted as it happens: use counts, decayed rates, and which expert follows which.

Invariant: causal sums only; a batch of T tokens counts as T tokens one after another, so chunks change nothing but the
last bits. Knows layers and experts by number; no slots, no devices.

Shapes: T tokens, L MoE layers, K active experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from .policy import NEW_CONVERSATION, Array, State, restored

HALF_LIVES = (3.0, 32.0)  # tokens
FLOOR = 0.1  # of the mean rate K / E: an expert not seen yet is not impossible
# Seldom seen experts say little about who follows them: each counts this many uses more that say nothing.
PSEUDO_USES = 4.0


class RouterStats:
    """`counts` and `weight_sums` are [L, E] in the order of `layers`; `recent` [L, 2, E] are counts that halve every
    HALF_LIVES tokens; `follows[l, i, j]` counts tokens that used i in layer l and j in layer l + 1 (float32: for
    Kimi-K2 34.8 MB)."""

    def __init__(self, layers: Sequence[int], n_routed_experts: int) -> None:
        self.layers = tuple(layers)
        shape = (len(self.layers), n_routed_experts)
        self.counts: npt.NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self.weight_sums: Array = np.zeros(shape)
        self.recent: Array = np.zeros((shape[0], len(HALF_LIVES), shape[1]))
        self.follows = np.zeros((max(shape[0] - 1, 0), shape[1], shape[1]), dtype=np.float32)
        # uses that `follows` and its rows are sums of: after a restore they are less than `counts`
        self.uses: Array = np.zeros(shape)
        self.top_k = 0  # 0 before the first choice
        self._decay = 0.5 ** (1 / np.array(HALF_LIVES))
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self._previous: tuple[int, npt.NDArray[np.int64]] | None = None

    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Add one batch: ids int64 [T, K] without repetition in a row, weights float32 [T, K]. Whose layer before had
        the same number of tokens just now is taken to have had the same tokens."""
        row, chosen = self._row[layer], ids.cpu().numpy()
        n_tokens, self.top_k = chosen.shape
        sums, flat = weights.cpu().numpy(), chosen.ravel()
        if n_tokens == 1:  # nothing is named twice, so plain additions do
            self.counts[row, flat] += 1
            self.uses[row, flat] += 1.0
            self.weight_sums[row, flat] += sums[0]
            self.recent[row] *= self._decay[:, None]
            self.recent[row][:, flat] += 1
        else:
            np.add.at(self.counts[row], flat, 1)
            np.add.at(self.uses[row], flat, 1.0)
            np.add.at(self.weight_sums[row], flat, sums.ravel())
            ages = np.arange(n_tokens - 1, -1, -1)
            for index, decay in enumerate(self._decay):
                counts = self.recent[row, index]
                counts *= decay**n_tokens
                np.add.at(counts, flat, np.repeat(decay**ages, self.top_k))
        if self._previous is not None:
            row_before, before = self._previous
            if row_before == row - 1 and len(before) == n_tokens:
                pairs = self.follows[row_before]
                if n_tokens == 1:
                    pairs[before[0][:, None], flat] += 1
                else:
                    np.add.at(pairs, (before[:, :, None], chosen[:, None, :]), 1)
        self._previous = row, chosen

    @property
    def distinct_experts(self) -> int:
        """Experts used at least once, over all layers."""
        return int(np.count_nonzero(self.counts))

    def reuse(self, layer_index: int) -> Array:
        """How likely the layer's next token uses each expert, by what earlier tokens used: float64 [E]."""
        n_experts = self.counts.shape[1]
        rates = (1 - self._decay) @ self.recent[layer_index] / len(HALF_LIVES)
        result: Array = rates + FLOOR * max(self.top_k, 1) / n_experts
        return result

    def lift(self, layer_index: int, ids_of_previous_layer: Sequence[int]) -> Array:
        """How much likelier each expert of a layer is made by what the same token used in the layer before, as a
        factor [E]."""
        pairs = self.follows[layer_index - 1]
        before, after = self.uses[layer_index - 1], self.uses[layer_index]
        return follow_lift(pairs, before, after, max(self.top_k, 1), ids_of_previous_layer)

    def state(self) -> State:
        return {"uses": self.uses.copy(), "recent": self.recent.copy(), "follows": self.follows.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Begin a new conversation with what earlier ones showed: it keeps its proportions and loses weight against
        what comes; of what was recent only the long memory stays. `counts` and `weight_sums` are not touched: they say
        what happened here. Raises ValueError where the shapes are another model's."""
        arrays = {name: restored(state, name, array.shape) for name, array in self.state().items()}
        self.uses[:] = arrays["uses"] * NEW_CONVERSATION
        self.follows[:] = arrays["follows"] * NEW_CONVERSATION
        self.recent[:] = arrays["recent"] * NEW_CONVERSATION
        self.recent[:, 0] = 0
        self._previous = None


def follow_lift(
    pairs: npt.NDArray[np.float32], before: Array, after: Array, top_k: int, chosen: Sequence[int]
) -> Array:
    """The factor by which the choice `chosen` of one layer changes the chances of each expert of the next: the square
    root of naive Bayes, since the K experts of a token don't speak independently (routing traces: exponents of 1/4 and
    1 recall less). pairs [E, E] and uses before and after [E] are counts."""
    mean = (after + 0.5) / (after.sum() + 0.5 * len(after)) * top_k
    rows = np.asarray(chosen)
    chances = (pairs[rows] + PSEUDO_USES * mean) / (before[rows, None] + PSEUDO_USES)
    factor: Array = np.exp(0.5 * np.log(chances / mean).sum(axis=0))
    return factor
