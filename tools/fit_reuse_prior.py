"""Fits the weights that offload/reuse_model.py starts from, on routing traces and synthetic routing.

For each source it also prints what weights fitted without that source reach on it: hit rates of policy `hazard` beside
`cyclic`, at several shares of slots, after the first quarter. The last line is PRIOR.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from k2lite.offload import reuse_model  # noqa: E402
from k2lite.offload.replay import count_of, replay  # noqa: E402
from k2lite.offload.routing_trace import read_trace  # noqa: E402
from tools.synthetic_routing import synthetic_routing  # noqa: E402

Floats = npt.NDArray[np.float64]
Source = tuple[npt.NDArray[np.uint16], int]  # ids, experts
RIDGE = 1.0
MAX_ITERATIONS, TOLERANCE = 30, 1e-4
SHARES = ("5%", "10%", "20%", "30%")
SKIP_TOKENS = 8  # of each source, where hardly anything is known yet
SYNTHETIC = {  # tokens, layers, experts, active: Kimi-Linear's shape, and two of other families
    "synthetic-256": (200, 26, 256, 8),
    "synthetic-128": (128, 48, 128, 6),
    "synthetic-128-top2": (64, 36, 128, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="from k2lite trace, or JSON lines")
    sources: dict[str, Source] = {}
    for path in parser.parse_args().traces:
        trace = read_trace(path)
        sources[path.stem] = trace.ids, trace.model.n_experts
    for seed, (name, (tokens, layers, experts, active)) in enumerate(SYNTHETIC.items()):
        sources[name] = synthetic_routing(tokens, layers, experts, active, seed=seed), experts
    data = {name: examples(*source) for name, source in sources.items()}
    for left_out in sources:
        reuse_model.PRIOR = fit([data[name] for name in sources if name != left_out])
        for policy in ("hazard", "cyclic"):
            print(f"{left_out:<24} {policy:<8} {' '.join(rates(*sources[left_out], policy))}", flush=True)
    print("PRIOR", np.round(fit(list(data.values())), 3).tolist())
    return 0


def rates(ids: npt.NDArray[np.uint16], n_experts: int, policy: str) -> list[str]:
    total = ids.shape[1] * n_experts
    runs = (
        replay(ids, n_experts, policy, count_of(share, total, "share"), warmup_tokens=len(ids) // 4) for share in SHARES
    )
    return [f"{run.hit_rate:.4f}" for run in runs]


def examples(ids: npt.NDArray[np.uint16], n_experts: int) -> tuple[Floats, Floats, float]:
    """Inputs [N, R + 1] as the model sees them, whether the next token used the expert [N], and the logit of K / E."""
    n_tokens, n_layers, active = ids.shape
    model = reuse_model.ReuseModel(n_layers, n_experts)
    inputs, used = [], []
    for token in range(n_tokens - 1):
        for layer in range(n_layers):
            model.observe(layer, ids[token, layer].tolist())
        if token >= SKIP_TOKENS:
            inputs.append(model.inputs.transpose(0, 2, 1).reshape(-1, len(reuse_model.PRIOR)).copy())
            outcome = np.zeros((n_layers, n_experts))
            np.put_along_axis(outcome, ids[token + 1].astype(np.int64), 1.0, axis=1)
            used.append(outcome.ravel())
    return np.concatenate(inputs), np.concatenate(used), float(np.log(active / (n_experts - active)))


def fit(data: list[tuple[Floats, Floats, float]]) -> Floats:
    """Logistic regression by Newton's method with halved steps; each source weighs as a million examples."""
    weights = np.zeros(len(reuse_model.PRIOR))
    best = loss(weights, data)
    for _ in range(MAX_ITERATIONS):
        gradient, information = -RIDGE * weights, RIDGE * np.eye(len(weights))
        for inputs, used, logit in data:
            p = 1 / (1 + np.exp(-(inputs @ weights + logit)))
            share = 1e6 / len(used)
            gradient += share * (inputs.T @ (used - p))
            information += share * ((inputs * (p * (1 - p))[:, None]).T @ inputs)
        step = np.linalg.solve(information, gradient)
        while (found := loss(weights + step, data)) > best and np.abs(step).max() > TOLERANCE:
            step = step / 2
        if np.abs(step).max() <= TOLERANCE:
            break
        weights, best = weights + step, found
    return weights


def loss(weights: Floats, data: list[tuple[Floats, Floats, float]]) -> float:
    total = RIDGE * float(weights @ weights) / 2
    for inputs, used, logit in data:
        scores = inputs @ weights + logit
        total += 1e6 / len(used) * float((np.logaddexp(0, scores) - used * scores).sum())
    return total


if __name__ == "__main__":
    sys.exit(main())
