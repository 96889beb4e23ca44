"""GPTQ against the paper's recursion in float64, and what it is for: less error on inputs with that Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from k2lite.quant.error_compensation import DAMPING, compensated, inverse_factor
from k2lite.quant.errors import CheckpointError
from k2lite.quant.formats import ScaleSearch
from k2lite.quant.packed_int import PackedInt
from tests.quant.numbers_in_numpy import PACKED, bf16_round, exact_values, stored_codes


def correlated(columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, columns] of a few strong directions and a little noise."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((tokens, 6)) @ random.standard_normal((6, columns))
    return torch.from_numpy((shared + 0.3 * random.standard_normal((tokens, columns))).astype(np.float32))


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.02)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return (x.double().T @ x.double()) / len(x)


def codes_by_the_paper(weight: torch.Tensor, hessian: torch.Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Column by column with the whole inverse, out of which each done column is eliminated (equations 2 and 3; no
    Cholesky factor); a group's amax scale is found when its first column is reached."""
    bits, size = PACKED[name]
    top = (1 << (bits - 1)) - 1
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    columns = w.shape[1]
    size = size or columns
    h[np.diag_indices(columns)] += DAMPING * np.diag(h).mean()
    inverse = np.linalg.inv(h)
    codes, scales = np.empty(w.shape, dtype=int), []
    for j in range(columns):
        if j % size == 0:
            amax = np.abs(w[:, j : j + size]).max(1).astype(np.float32)
            scales.append(bf16_round(amax / np.float32(top)).astype(np.float64))
        codes[:, j] = np.rint(w[:, j] / scales[-1]).clip(-top, top)
        lost = (w[:, j] - codes[:, j] * scales[-1]) / inverse[j, j]
        w -= np.outer(lost, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, np.stack(scales, axis=1)


@pytest.mark.parametrize("name", ["int4_g32", "int4_g64", "int8_channel"])
def test_codes_and_scales_are_those_of_the_paper(name: str) -> None:
    hessian = hessian_of(correlated(128, 400))
    weight = weights(24, 128)
    expected, scales = codes_by_the_paper(weight, hessian, name)
    parts = compensated(PackedInt(name), weight, inverse_factor(hessian.clone()), "amax")
    # float32 on the way may turn a tie, and what a turned code changes behind it: rare, and one step
    found = stored_codes(parts, name)
    assert (found != expected).mean() < 0.01
    assert np.abs(found - expected).max() <= 1
    assert np.allclose(parts["weight_scale"].double().numpy(), scales, rtol=2**-7)


@pytest.mark.parametrize("scale_search", ["amax", "mse"])
@pytest.mark.parametrize("name", ["int4_g32", "int4_g128"])
def test_the_error_on_inputs_is_smaller_than_of_rounding_to_the_nearest(name: str, scale_search: ScaleSearch) -> None:
    x = correlated(256, 600)
    weight = weights(40, 256)
    target = PackedInt(name)
    hessian = hessian_of(x)
    parts = compensated(
        target, weight, inverse_factor(hessian.clone()), scale_search,
        hessian.diagonal().float() if scale_search == "mse" else None,
    )  # fmt: skip

    def error(stored: dict[str, torch.Tensor]) -> float:
        difference = torch.from_numpy(exact_values(stored, name)).reshape(weight.shape) - weight.double()
        return float(((x.double() @ difference.T) ** 2).mean())

    assert error(parts) < 0.5 * error(target.quantize(weight, scale_search=scale_search))


def test_with_no_knowledge_it_rounds_to_the_nearest() -> None:
    weight = weights(16, 128)
    target = PackedInt("int4_g32")
    for hessian in (torch.zeros(128, 128, dtype=torch.float64), torch.eye(128, dtype=torch.float64) * 3):
        parts = compensated(target, weight, inverse_factor(hessian), "mse")
        for suffix, part in target.quantize(weight, scale_search="mse").items():
            assert torch.equal(parts[suffix], part), suffix


def test_rows_do_not_depend_on_one_another_and_weights_stay_as_they_are() -> None:
    weight = weights(12, 128)
    before = weight.clone()
    factor = inverse_factor(hessian_of(correlated(128, 50)))  # fewer tokens than columns
    whole = compensated(PackedInt("int4_g32"), weight, factor, "amax")
    part = compensated(PackedInt("int4_g32"), weight[5:7], factor, "amax")
    assert torch.equal(weight, before)
    assert torch.equal(whole["weight_packed"][5:7], part["weight_packed"])
    assert torch.equal(whole["weight_scale"][5:7], part["weight_scale"])


def test_a_broken_hessian_is_refused() -> None:
    with pytest.raises(CheckpointError, match="NaN, infinity or a negative square"):
        inverse_factor(torch.full((4, 4), torch.nan, dtype=torch.float64))
