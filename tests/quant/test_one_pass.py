"""A few rows at a time give the bytes of the steps one after another, and refuse what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from k2lite.quant.errors import CheckpointError
from k2lite.quant.formats import PACKED_INT, ScaleSearch, format_named
from k2lite.quant.one_pass import in_one_pass
from k2lite.quant.types import QuantTensor
from tests.quant.numbers_in_numpy import PACKED, bf16_round, in_groups, random_matrix, stored_codes
from tests.quant.scale_rules import sample

SOURCES = ("fp8_e4m3_b128", "bf16")
RULES: list[tuple[ScaleSearch, bool]] = [("amax", False), ("mse", False), ("mse", True)]


def stored(source: str, weight: torch.Tensor) -> tuple[QuantTensor, torch.Tensor]:
    """A weight as stored, and its values by the format's own torch code."""
    kind = format_named(source)
    tensor = QuantTensor(kind, tuple(weight.shape), kind.quantize(weight))
    return tensor, tensor.dequantize()


def uneven(rows: int, columns: int) -> torch.Tensor:
    """With rows of zeros, and of numbers so small and so large that squares and quotients leave float32."""
    weight = random_matrix(rows, columns, seed=rows)
    weight[1] = 0
    weight[2] *= 1e-30
    weight[3] *= 1e-40
    weight[4] *= 1e30
    return weight


@pytest.mark.parametrize("target", PACKED_INT)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(5, 384), (130, 384), (9, 132)])
def test_the_bytes_and_sums_are_those_of_the_steps(source: str, target: str, shape: tuple[int, int]) -> None:
    if shape[1] % (PACKED[target][1] or 1):
        pytest.skip("the format has no such rows")
    tensor, values = stored(source, uneven(*shape))
    kind = format_named(target)
    importance = torch.from_numpy(np.random.default_rng(4).gamma(0.7, size=shape[1]).astype(np.float32))
    for rule, weighted in RULES:
        given = importance if weighted else None
        made = in_one_pass(tensor, kind, rule, given)
        assert made is not None
        expected = kind.quantize(values, scale_search=rule, importance=given)
        assert made[0].keys() == expected.keys() - {"weight_shape"}
        for suffix, part in made[0].items():
            assert part.dtype == expected[suffix].dtype
            assert torch.equal(part, expected[suffix]), (rule, suffix)
        before, after = values.double().numpy(), kind.dequantize(expected, shape).double().numpy()
        first, second, product = made[1]
        np.testing.assert_allclose([first, second], [(before**2).sum(), (after**2).sum()], rtol=1e-7)
        np.testing.assert_allclose(first + second - 2 * product, ((before - after) ** 2).sum(), rtol=1e-6)


@pytest.mark.parametrize("ulps", [-3, -1, 0, 1, 3])
def test_codes_are_the_nearest_where_it_is_close(ulps: int) -> None:
    """E4M3 numbers that are 0.5, 1.5 ... 6.5 times the scale but for the last bits of their block's; the codes are
    those of numpy's division."""
    close = torch.tensor([448.0, *range(32, 448, 64)] * 4).repeat_interleave(4)
    codes = torch.cat((close, -close))[None].repeat(128, 128 // 32).to(torch.float8_e4m3fn)
    scales = (
        bf16_round(np.exp2(np.random.default_rng(6).uniform(-30, 30, codes.shape[1] // 128)).astype(np.float32)) / 64
    )
    scales = (scales.view(np.int32) + ulps).view(np.float32)
    parts = {"weight": codes, "weight_scale_inv": torch.from_numpy(scales[None].astype(np.float32))}
    made = in_one_pass(QuantTensor(format_named("fp8_e4m3_b128"), tuple(codes.shape), parts), format_named("int4_g32"))
    assert made is not None
    weight = codes.to(torch.float32).numpy() * np.repeat(scales, 128)
    found = made[0]["weight_scale"].to(torch.float32).numpy().repeat(32, 1)
    np.testing.assert_array_equal(stored_codes(made[0], "int4_g32"), np.rint(weight / found).clip(-7, 7))


def searched(weight: np.ndarray, name: str, factors: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The scales of --scale-search mse as scale_search.py says it, in numpy: a group of weights at a time and, as
    float64 holds what fused multiply-adds round once, bit for bit."""
    highest = 2 ** (PACKED[name][0] - 1) - 1
    groups = in_groups(weight, name).astype(np.float64)
    many, places = groups.shape[:2], groups.shape[2]
    heavy = np.ones(groups.shape) if importance is None else in_groups(np.tile(importance, (len(weight), 1)), name)

    def steps(scale: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inverse = (np.float32(1) / scale).astype(np.float64)
        return groups[..., place], inverse, np.rint(groups[..., place] * inverse).clip(-highest - 1, highest)

    def error(scale: np.ndarray) -> np.ndarray:
        total = np.zeros(many, np.float32)
        for place in range(places):
            value, inverse, code = steps(scale, place)
            off = (value * inverse - code).astype(np.float32)
            weighted = (off * heavy[..., place].astype(np.float32)).astype(np.float64)
            total = (weighted * off + total).astype(np.float32)
        return np.sqrt(total) * np.abs(scale)

    def liked(scale: np.ndarray) -> np.ndarray:
        above, below = np.zeros(many, np.float32), np.zeros(many, np.float32)
        for place in range(places):
            value, inverse, code = steps(scale, place)
            weighted = code * heavy[..., place]
            above = (
                (value * inverse).astype(np.float32).astype(np.float64) * weighted.astype(np.float32) + above
            ).astype(np.float32)
            below = (code * weighted.astype(np.float32) + below).astype(np.float32)
        return bf16_round(scale * above / below)

    best = bf16_round(np.abs(groups).max(-1).astype(np.float32) / np.float32(highest))
    least = error(best)
    start = np.where(groups.max(-1) > -groups.min(-1), -best, best)
    for trial in [*(bf16_round(start * factor) for factor in factors), None, None]:
        scale = liked(best) if trial is None else trial
        off = error(scale)
        better = off < least * (np.float32(1) - np.float32(1e-4))
        best, least = np.where(better, scale, best), np.where(better, off, least)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "int8_g128"])
def test_searched_scales_are_those_of_the_rule(name: str, weighted: bool) -> None:
    factors = {4: np.arange(28, 43) / 40, 8: np.arange(194, 210) / 200}[PACKED[name][0]].astype(np.float32)
    tensor, values = stored("bf16", sample("laplace", 13, 1280, seed=2))
    importance = np.random.default_rng(3).gamma(0.7, size=1280).astype(np.float32) if weighted else None
    made = in_one_pass(tensor, format_named(name), "mse", None if importance is None else torch.from_numpy(importance))
    assert made is not None
    expected = searched(values.numpy(), name, factors, importance)
    np.testing.assert_array_equal(made[0]["weight_scale"].to(torch.float32).numpy(), expected)


def test_other_formats_have_no_such_way() -> None:
    tensor, _ = stored("bf16", uneven(5, 384))
    assert in_one_pass(tensor, format_named("fp8_e4m3_b128")) is None
    plain = QuantTensor(format_named("f16"), (5, 384), {"weight": torch.zeros(5, 384, dtype=torch.float16)})
    assert in_one_pass(plain, format_named("int4_g32")) is None


@pytest.mark.parametrize("target", ["int4_g32", "int8_channel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float, target: str) -> None:
    for columns in (384, 132) if target == "int8_channel" else (384,):
        tensor, _ = stored("bf16", uneven(5, columns))
        tensor.parts["weight"][3, 7] = value
        for rule, _ in RULES:
            with pytest.raises(CheckpointError, match=f"NaN or infinity and can't be quantized to {target}"):
                in_one_pass(tensor, format_named(target), rule)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_in_e4m3_is_refused(code: int) -> None:
    tensor, _ = stored("fp8_e4m3_b128", uneven(130, 384))
    tensor.parts["weight"].view(torch.uint8)[129, 200] = code
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        in_one_pass(tensor, format_named("int4_g32"))
