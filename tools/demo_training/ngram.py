"""Modified Kneser-Ney 5-gram, interpolated: the yardstick that a language model on the same tokens must beat.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3.
Token ids must fit 12 bits, so that five of them pack into a 64-bit key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BITS = 12
ORDER = 5
Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """One order: n-grams with their discounted share of their context, contexts with what is left for lower orders."""

    grams: Keys
    share: Floats
    contexts: Keys
    left: Floats


class KneserNey:
    def __init__(self, pieces: list[npt.NDArray[np.uint16]], n_vocab: int) -> None:
        """Count the n-grams inside each of the `pieces`."""
        self._n_vocab = n_vocab
        grams = np.concatenate([_packed(piece, ORDER) for piece in pieces if len(piece) >= ORDER])
        keys, counts = np.unique(grams, return_counts=True)
        self._levels: list[_Level] = []
        for order in range(ORDER, 0, -1):
            self._levels.append(_level(keys, counts))
            if order > 1:
                # below the highest order an n-gram counts once for each different token before it
                keys, counts = np.unique(keys & np.uint64((1 << (BITS * (order - 1))) - 1), return_counts=True)

    def log_probabilities(self, tokens: npt.NDArray[np.uint16]) -> Floats:
        """Natural log of the probability of each token from the fifth on, given the four before it."""
        grams = _packed(tokens, ORDER)
        probability = np.full(len(grams), 1.0 / self._n_vocab)
        for order, level in zip(range(1, ORDER + 1), reversed(self._levels), strict=True):
            key = grams & np.uint64((1 << (BITS * order)) - 1)
            share = _find(level.grams, level.share, key, 0.0)
            # a context that never occurred leaves everything to the lower orders
            probability = share + _find(level.contexts, level.left, key >> np.uint64(BITS), 1.0) * probability
        result: Floats = np.log(probability)
        return result


def _packed(tokens: npt.NDArray[np.uint16], order: int) -> Keys:
    """Every run of `order` tokens as one number, the oldest token in the highest bits."""
    keys = np.zeros(len(tokens) - order + 1, dtype=np.uint64)
    for place in range(order):
        keys = (keys << np.uint64(BITS)) | tokens[place : len(keys) + place].astype(np.uint64)
    return keys


def _level(keys: Keys, counts: npt.NDArray[np.int64]) -> _Level:
    n1, n2, n3, n4 = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]).clip(0, None)
    taken = np.minimum(discounts[np.minimum(counts, 3)], counts)
    contexts, place = np.unique(keys >> np.uint64(BITS), return_inverse=True)
    totals = np.bincount(place, weights=counts)
    return _Level(keys, (counts - taken) / totals[place], contexts, np.bincount(place, weights=taken) / totals)


def _find(keys: Keys, values: Floats, wanted: Keys, default: float) -> Floats:
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], default)
