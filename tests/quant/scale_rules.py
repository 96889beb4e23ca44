"""The rules for scales of others, in float64 numpy, and the samples that all are judged on.

`python -m tests.quant.scale_rules` prints the table of docs/quality.md.
"""

from __future__ import annotations

import numpy as np
import torch

from k2lite.quant.formats import ScaleSearch, format_named
from tests.quant.numbers_in_numpy import PACKED, bf16_round, exact_values, in_groups


def sample(kind: str, rows: int = 48, columns: int = 512, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    values = {
        "gaussian": lambda: random.standard_normal((rows, columns)),
        "laplace": lambda: random.laplace(size=(rows, columns)),
        "student t, 4": lambda: random.standard_t(4, (rows, columns)),
    }[kind]()
    return torch.from_numpy((values * 0.02).astype(np.float32))


KINDS = ["gaussian", "laplace", "student t, 4"]


def squared_errors(
    weight: torch.Tensor, name: str, scale_search: ScaleSearch, importance: torch.Tensor | None = None
) -> np.ndarray:
    """Unweighted, [out, groups, columns of a group]."""
    parts = format_named(name).quantize(weight, scale_search=scale_search, importance=importance)
    return (exact_values(parts, name) - in_groups(weight.double().numpy(), name)) ** 2


def min_max_errors(weight: torch.Tensor, name: str) -> np.ndarray:
    """compressed-tensors' rule: half the range for the largest weight, and one code more below zero."""
    half = 1 << (PACKED[name][0] - 1)
    groups = in_groups(weight.numpy(), name)
    scale = bf16_round(np.abs(groups).max(-1) / np.float32(half - 0.5)).astype(np.float64)[..., None]
    return np.asarray((np.rint(groups / scale).clip(-half, half - 1) * scale - groups) ** 2)


def q4_0_errors(weight: torch.Tensor) -> np.ndarray:
    """llama.cpp's Q4_0: the weight of the largest magnitude becomes code -8, scales are F16."""
    groups = in_groups(weight.numpy(), "int4_g32")
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = largest / np.float32(-8)
    codes = np.trunc(groups / scale + np.float32(8.5)).clip(0, 15) - 8
    return np.asarray((codes * scale.astype(np.float16).astype(np.float64) - groups) ** 2)


def main() -> None:
    print("data, format: amax rule, then as a ratio to it: min-max rule, Q4_0 rule, mse")
    for kind in KINDS:
        weight = sample(kind)
        for name in PACKED:
            simple = squared_errors(weight, name, "amax").sum()
            relative = simple / float(weight.double().square().sum())
            q4_0 = f"{q4_0_errors(weight).sum() / simple:.3f}" if name == "int4_g32" else "-"
            ratios = [
                f"{errors.sum() / simple:.3f}"
                for errors in (min_max_errors(weight, name), squared_errors(weight, name, "mse"))
            ]
            print(f"| {kind}, {name} | {relative:.2e} | {ratios[0]} | {q4_0} | {ratios[1]} |")


if __name__ == "__main__":
    main()
