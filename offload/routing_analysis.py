"""What a routing trace shows: popularity, entropy, reuse over time, and how far one layer foretells the next.

Invariant: what is predicted was learned from earlier tokens only: tables come from the first half of a trace and are
judged on the second. Knows no cache. Shapes: T tokens, L MoE layers, K active experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k2lite.quant.errors import RequestError

from .statistics import follow_lift

LAGS = (1, 2, 4, 8, 16, 64)  # tokens
SHARES = (0.1, 0.25, 0.5)  # of a layer's experts
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutingFacts:
    """Per layer, in the order of the trace's layers."""

    counts: npt.NDArray[np.int64]  # [L, E]
    distinct: npt.NDArray[np.int64]  # [L] experts used at all
    entropy_bits: Floats  # [L] of the distribution of uses; log2 E where all are used alike
    top_shares: dict[float, Floats]  # share of experts -> [L] share of uses that the most used ones have
    reuse: dict[
        int, Floats
    ]  # lag -> [L] share of a token's experts that the token `lag` before used; shorter traces: fewer
    by_previous_token: Floats  # [L - 1] recall at K for layers 1 to L - 1: what the token before used in that layer
    by_popularity: Floats  # [L - 1] the layer's most used experts
    by_previous_layer: Floats  # [L - 1] what follows what this token used in the layer before


def analyse(ids: npt.NDArray[np.uint16], n_experts: int) -> RoutingFacts:
    """Facts of a trace's ids [T, L, K]. Raises RequestError below two tokens."""
    n_tokens, _, active = ids.shape
    if n_tokens < 2:
        raise RequestError(f"the trace has {n_tokens} tokens; at least 2 are needed to see reuse")
    used = one_hot(ids, n_experts)
    counts = used.sum(axis=0, dtype=np.int64)
    ordered = -np.sort(-counts, axis=1)
    p = counts / counts.sum(axis=1, keepdims=True)
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return RoutingFacts(
        counts=counts,
        distinct=(counts > 0).sum(axis=1),
        entropy_bits=-(p * logs).sum(axis=1),
        top_shares={
            share: ordered[:, : max(1, round(share * n_experts))].sum(axis=1) / counts.sum(axis=1) for share in SHARES
        },
        reuse={
            lag: (used[lag:] & used[:-lag]).sum(axis=(0, 2)) / ((n_tokens - lag) * active)
            for lag in LAGS
            if lag < n_tokens
        },
        **_predictability(used, ids),
    )


def one_hot(ids: npt.NDArray[np.uint16], n_experts: int) -> npt.NDArray[np.bool_]:
    """Which experts each token used, bool [T, L, E]."""
    used = np.zeros((*ids.shape[:2], n_experts), dtype=np.bool_)
    np.put_along_axis(used, ids.astype(np.int64), True, axis=2)
    return used


def touched_share(ids: npt.NDArray[np.uint16], tokens: int, n_experts: int) -> float:
    """Share of a layer's experts that so many tokens in a row use: the mean over layers and over the whole runs of ids
    [T, L, K], which begins anew where it is shorter."""
    tokens = min(tokens, max(len(ids), 1))
    used = one_hot(ids, n_experts)
    runs = [used[at : at + tokens].any(axis=0).mean() for at in range(0, len(ids) - tokens + 1, tokens)]
    return float(np.mean(runs))


def _predictability(used: npt.NDArray[np.bool_], ids: npt.NDArray[np.uint16]) -> dict[str, Floats]:
    """Recall at K of three guesses at a layer's choice, on the second half of the tokens."""
    n_tokens, n_layers, active = ids.shape
    half = n_tokens // 2
    learned = used[:half].astype(np.float64)
    judged = used[half:]
    popular, paired = np.zeros(n_layers - 1), np.zeros(n_layers - 1)
    for layer in range(1, n_layers):
        totals = learned[:, layer].sum(axis=0)
        popular[layer - 1] = _recall(np.broadcast_to(totals, judged[:, layer].shape), judged[:, layer], active)
        pairs = (learned[:, layer - 1].T @ learned[:, layer]).astype(np.float32)
        before = learned[:, layer - 1].sum(axis=0)
        mean = totals + 0.5
        scores = np.stack(
            [mean * follow_lift(pairs, before, totals, active, row) for row in ids[half:, layer - 1].astype(np.int64)]
        )
        paired[layer - 1] = _recall(scores, judged[:, layer], active)
    repeated = (used[half:] & used[half - 1 : -1]).sum(axis=(0, 2)) / (len(judged) * active)
    return {"by_previous_token": repeated[1:], "by_popularity": popular, "by_previous_layer": paired}


def _recall(scores: Floats, truth: npt.NDArray[np.bool_], active: int) -> float:
    """The share of true choices [n, E] among the K best scores of each row."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :active]
    return float(np.take_along_axis(truth, best, axis=1).mean())
