"""How likely each expert is to be used by a layer's next token: logistic regression on decayed rates, learned online.

Inputs of an expert are log(2 + rate / (K / E)) for the rates that counts of several half-lives give, and the logit
begins at that of K / E, so that one set of weights serves every shape of router: it starts from PRIOR, fitted to public
traces and synthetic ones, and each token's outcome moves it by a Newton step. Invariant: causal; a probability depends
on earlier tokens only. A layer's time is the number of tokens that it has routed. Knows neither slots nor other layers.

Shapes: L MoE layers, E experts, K active experts, R rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .policy import NEW_CONVERSATION, Array, State, restored

HALF_LIVES = (1.0, 3.0, 10.0, 32.0, 256.0)  # tokens
# The slowest rate starts from the mean K / E, held to by as many tokens as this: an expert not seen yet is not dead.
PSEUDO_TOKENS = 8.0
# Weights of the rates, then the constant: tools/fit_reuse_prior.py prints them.
PRIOR = np.array([0.928, -0.089, 0.373, 0.420, 0.804, -2.902])
PRIOR_PRECISION = 100.0
OFFSET = 2.0  # in units of K / E: below it rates hardly differ
FORGET = 0.998  # of what earlier tokens taught the weights, per token
LARGEST_LOGIT = 14.0  # probabilities stay between 8e-7 and 1 - 8e-7


class ReuseModel:
    """Probabilities for the next token, layer by layer."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._decay = 0.5 ** (1 / np.array(HALF_LIVES))[:, None]
        self._counts = np.zeros((n_layers, len(HALF_LIVES), n_experts))
        # what counts of a half-life sum to if an expert is used by every token; the finite start is corrected by it
        self._seen = np.zeros((n_layers, len(HALF_LIVES), 1))
        # float64 [L, R + 1, E], the last of them 1: what the present probabilities were made from
        self.inputs = np.zeros((n_layers, len(PRIOR), n_experts))
        self.inputs[:, -1] = 1.0
        self._probability = np.zeros((n_layers, n_experts))
        self._ready = np.zeros(n_layers, dtype=np.bool_)
        self.weights: Array = PRIOR.copy()
        self._precision = np.eye(len(PRIOR)) * PRIOR_PRECISION
        self._gradient = np.zeros(len(PRIOR))
        self._information = np.zeros_like(self._precision)

    def observe(self, layer_index: int, ids: Sequence[int]) -> Array:
        """Learn from one token's choice; the probabilities of the layer's next token, float64 [E], for reading."""
        chosen = np.asarray(ids)
        if self._ready[layer_index]:
            self._learn(layer_index, chosen)
        self._ready[layer_index] = True
        counts, seen = self._counts[layer_index], self._seen[layer_index]
        counts *= self._decay
        counts[:, chosen] += 1
        seen *= self._decay
        seen += 1
        return self._predict(layer_index, len(chosen))

    def step(self) -> None:
        """Move the weights by what all layers saw since the last step: one Newton step of the log likelihood."""
        self._precision *= FORGET
        self._precision += self._information
        self._precision.flat[:: len(PRIOR) + 1] += (1 - FORGET) * PRIOR_PRECISION
        self.weights = self.weights + np.linalg.solve(self._precision, self._gradient)
        self._gradient[:] = 0
        self._information[:] = 0

    def _learn(self, layer_index: int, chosen: npt.NDArray[np.int64]) -> None:
        inputs, p = self.inputs[layer_index], self._probability[layer_index]
        error = -p
        error[chosen] += 1
        self._gradient += inputs @ error
        self._information += (inputs * (p * (1 - p))) @ inputs.T

    def _predict(self, layer_index: int, active: int) -> Array:
        n_experts = self._counts.shape[2]
        # a model that always uses all its experts has nothing to predict
        mean = min(active, n_experts - 0.5) / n_experts
        seen, inputs = self._seen[layer_index], self.inputs[layer_index]
        # what is missing of a full memory counts as the mean; the slowest one counts PSEUDO_TOKENS of it
        full = 1 / (1 - self._decay)
        missing = full - seen
        missing[-1] = PSEUDO_TOKENS
        rates = (self._counts[layer_index] + missing * mean) / (seen + missing)
        np.log(rates / mean + OFFSET, out=inputs[:-1])
        p: Array = self._probability[layer_index]
        logits = self.weights @ inputs + math.log(mean / (1 - mean))
        np.divide(1, 1 + np.exp(-logits.clip(-LARGEST_LOGIT, LARGEST_LOGIT)), out=p)
        return p

    def long_run_rates(self) -> Array:
        """The slowest rate of every expert, float64 [L, E]: what is known between two conversations."""
        n_experts = self._counts.shape[2]
        counts, seen = self._counts[:, -1], self._seen[:, -1]
        total = counts.sum(axis=1, keepdims=True)
        mean = np.divide(total, seen * n_experts, out=np.full_like(seen, 1 / n_experts), where=seen > 0)
        rates: Array = (counts + PSEUDO_TOKENS * mean) / (seen + PSEUDO_TOKENS)
        return rates.clip(1e-6, 1 - 1e-6)

    def state(self) -> State:
        return {
            "counts": self._counts.copy(),
            "seen": self._seen.copy(),
            "weights": self.weights.copy(),
            "precision": self._precision.copy(),
        }

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Counts keep their rates and lose weight against what comes."""
        arrays = {name: restored(state, name, array.shape) for name, array in self.state().items()}
        self._counts[:] = arrays["counts"] * NEW_CONVERSATION
        self._seen[:] = arrays["seen"] * NEW_CONVERSATION
        self.weights = arrays["weights"]
        self._precision[:] = arrays["precision"]
        self._ready[:] = False
        self._gradient[:] = 0
        self._information[:] = 0
