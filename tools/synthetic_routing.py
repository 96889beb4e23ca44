"""Synthetic routing with the locality of a real router: each expert's score is a sum of what never changes, what
changes slowly, what changes fast, and noise; the K best are chosen.

The parameters were fitted to Kimi-Linear's reuse at lags 1 to 64 (routing.md section 6: within .04).
Shapes: T tokens, L layers, K active experts, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GLOBAL_SIGMA, REQUEST_SIGMA = 1.0, 1.71
SLOW_SIGMA, SLOW_HALF_LIFE = 0.665, 12.4  # tokens
FAST_SIGMA, FAST_HALF_LIFE = 2.09, 2.6


def synthetic_routing(
    n_tokens: int, n_layers: int, n_experts: int, active: int, *, seed: int
) -> npt.NDArray[np.uint16]:
    """One request's ids, uint16 [T, L, K], ascending in each choice."""
    random = np.random.default_rng(seed)
    shape = (n_layers, n_experts)
    fixed = random.normal(0, GLOBAL_SIGMA, shape) + random.normal(0, REQUEST_SIGMA, shape)
    slow, fast = random.normal(0, SLOW_SIGMA, shape), random.normal(0, FAST_SIGMA, shape)
    result = np.empty((n_tokens, n_layers, active), dtype=np.uint16)
    for token in range(n_tokens):
        slow = _walk(slow, SLOW_SIGMA, SLOW_HALF_LIFE, random)
        fast = _walk(fast, FAST_SIGMA, FAST_HALF_LIFE, random)
        scores = fixed + slow + fast + random.gumbel(size=shape)
        result[token] = np.sort(np.argsort(-scores, axis=1)[:, :active], axis=1)
    return result


def _walk(
    values: npt.NDArray[np.float64], sigma: float, half_life: float, random: np.random.Generator
) -> npt.NDArray[np.float64]:
    """One step of a stationary autoregressive process."""
    keep = 0.5 ** (1 / half_life)
    return keep * values + np.sqrt(1 - keep * keep) * random.normal(0, sigma, values.shape)
