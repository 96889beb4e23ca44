"""The searched scales against the rules of others and against the best there is, all in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.quant.formats import format_named
from k2lite.quant.scale_search import FACTORS
from tests.quant.numbers_in_numpy import PACKED, bf16_round, in_groups, stored_codes
from tests.quant.scale_rules import KINDS, min_max_errors, q4_0_errors, sample, squared_errors
from tests.samples import examples

MAX_CODE = {4: 7, 8: 127}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PACKED)
def test_never_worse_than_amax_and_better_in_sum(name: str, kind: str) -> None:
    weight = sample(kind)
    searched, simple = (squared_errors(weight, name, rule).sum(-1) for rule in ("mse", "amax"))
    assert (searched <= simple).all()
    assert searched.sum() < simple.sum() * (0.75 if name.startswith("int4") else 0.98)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PACKED)
def test_better_than_the_rules_of_others_at_the_same_bits(name: str, kind: str) -> None:
    weight = sample(kind)
    ours = squared_errors(weight, name, "mse").sum()
    assert ours < min_max_errors(weight, name).sum()
    if name == "int4_g32":
        assert ours < q4_0_errors(weight).sum()


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "int8_g128"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nearly_as_good_as_the_best_of_all_scales(name: str, weighted: bool) -> None:
    """Against every BF16 scale of either sign between half and 1.3 of amax's, with codes -8..7."""
    weight, largest = sample("gaussian", 6, 256), MAX_CODE[PACKED[name][0]]
    importance = np.random.default_rng(1).gamma(0.7, size=256).astype(np.float32)
    weights = in_groups(np.tile(importance, (6, 1)), name) if weighted else np.float32(1)
    groups = in_groups(weight.double().numpy(), name)
    best = np.full(groups.shape[:2], np.inf)
    factors = np.linspace(0.5, 1.3, 400, dtype=np.float32)
    for factor in (*factors, *-factors):
        scale = bf16_round(np.abs(groups).max(-1).astype(np.float32) / largest * factor).astype(np.float64)[..., None]
        codes = np.rint(groups / scale).clip(-largest - 1, largest)
        best = np.minimum(best, ((codes * scale - groups) ** 2 * weights).sum(-1))
    ours = squared_errors(weight, name, "mse", torch.from_numpy(importance) if weighted else None)
    found = (ours * weights).sum(-1)
    assert (found >= best * (1 - 1e-9)).all()
    # the sign goes by the largest weight, which may be an unimportant one
    assert found.sum() < best.sum() * (1.1 if weighted else 1.02)


@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(PACKED)), shape=st.floats(0.05, 5))
@settings(max_examples=examples(20), deadline=None)
def test_importance_is_what_is_made_small(seed: int, name: str, shape: float) -> None:
    random = np.random.default_rng(seed)
    weight = sample("laplace", 8, 256, seed)
    importance = torch.from_numpy(random.gamma(shape, size=256).astype(np.float32))
    weights = in_groups(np.tile(importance.double().numpy(), (8, 1)), name)
    weighted, unweighted, simple = (
        (squared_errors(weight, name, rule, given) * weights).sum(-1)
        for rule, given in (("mse", importance), ("mse", None), ("amax", None))
    )
    assert (weighted <= simple * (1 + 1e-9)).all()
    assert weighted.sum() <= unweighted.sum() * 1.02  # what a search of few candidates may miss


def test_importance_helps() -> None:
    weight = sample("gaussian", 32, 512)
    importance = torch.from_numpy(np.random.default_rng(2).gamma(0.3, size=512).astype(np.float32))
    weights = in_groups(np.tile(importance.numpy(), (32, 1)), "int4_g32")
    aware, blind = ((squared_errors(weight, "int4_g32", "mse", given) * weights).sum() for given in (importance, None))
    assert aware < blind * 0.9


@pytest.mark.parametrize("name", ["int4_g32", "int8_channel"])
def test_equal_importance_changes_nothing(name: str) -> None:
    weight, fmt = sample("laplace", 8, 256), format_named(name)
    plain = fmt.quantize(weight, scale_search="mse")
    for value in (1.0, 2.0**-20, 2.0**20):
        parts = fmt.quantize(weight, scale_search="mse", importance=torch.full((256,), value))
        for suffix, part in plain.items():
            assert torch.equal(parts[suffix], part)


def test_columns_without_importance_leave_a_group_as_amax_has_it() -> None:
    weight, fmt = sample("laplace", 8, 128), format_named("int4_g32")
    importance = torch.ones(128)
    importance[32:64] = 0
    parts, simple = fmt.quantize(weight, scale_search="mse", importance=importance), fmt.quantize(weight)
    same = (parts["weight_scale"] == simple["weight_scale"]).all(0)
    assert same.tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["int4_g32", "int8_g128"])
@pytest.mark.parametrize("exponent", [-90, 90])
def test_the_size_of_the_weights_makes_no_difference(name: str, exponent: int) -> None:
    """Squares of these would be zero or infinite in float32."""
    weight, fmt = sample("laplace", 8, 256), format_named(name)
    parts = fmt.quantize(weight, scale_search="mse")
    scaled = fmt.quantize(weight * 2.0**exponent, scale_search="mse")
    np.testing.assert_array_equal(stored_codes(scaled, name), stored_codes(parts, name))
    assert torch.equal(scaled["weight_scale"].double(), parts["weight_scale"].double() * 2.0**exponent)


@pytest.mark.parametrize("columns", [4, 124, 128, 132, 516])
@pytest.mark.parametrize("rows", [1, 63, 65])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_weight_of_a_long_row_is_left_out(rows: int, columns: int, weighted: bool) -> None:
    """A group is worked on in spans, and groups side by side; rows of a whole channel are of any length. Judged in
    float64: no factor of the search alone does better than what it chose."""
    weight = sample("laplace", rows, columns, seed=rows)
    importance = np.random.default_rng(3).gamma(0.7, size=columns).astype(np.float32) if weighted else None
    weights = np.float32(1) if importance is None else importance
    given = None if importance is None else torch.from_numpy(importance)
    found = (squared_errors(weight, "int8_channel", "mse", given)[:, 0] * weights).sum(-1)
    values = weight.numpy()
    sign = np.where(values.max(-1) > -values.min(-1), np.float32(-1), np.float32(1))
    start = bf16_round(np.abs(values).max(-1) / np.float32(127)) * sign
    for factor in FACTORS[127]:
        scale = bf16_round(start * factor).astype(np.float64)[:, None]
        off = np.rint(values / scale).clip(-128, 127) * scale - values
        assert (found <= (off**2 * weights).sum(-1) * 1.0003).all()
