"""What all number formats promise; plain numbers and FP8 blocks against numpy and the golden vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.formats import FORMAT_NAMES, format_named
from k2lite.quant.fp8 import Fp8Block
from tests.quant.numbers_in_numpy import bf16_round, random_matrix

FP8 = format_named("fp8_e4m3_b128")


def e4m3_table() -> np.ndarray:
    """The 256 values of float8 e4m3fn from its definition: bias 7, 3 bits of mantissa, 0x7F is NaN."""
    values = []
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        values.append((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6)
    values[127] = math.nan
    return np.array(values + [-value for value in values])


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """Codes of the nearest values, ties to the even code; |x| <= 448."""
    table = e4m3_table()[:127]
    above = np.searchsorted(table, np.abs(x)).clip(1, 126)
    low, high = table[above - 1], table[above]
    middle = (low + high) / 2
    up = (np.abs(x) > middle) | ((np.abs(x) == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    return np.where(np.signbit(x), code + 128, code).astype(np.uint8)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_quantize_makes_the_parts_that_the_format_states(name: str) -> None:
    fmt = format_named(name)
    parts = fmt.quantize(random_matrix(40, 256))
    assert {s: (p.dtype, tuple(p.shape)) for s, p in parts.items()} == fmt.parts((40, 256))
    assert sum(part.nbytes for part in parts.values()) == fmt.nbytes((40, 256))
    assert fmt.name == name
    assert fmt == format_named(name)


def test_unknown_format_names_the_known() -> None:
    with pytest.raises(CheckpointError, match=r"'q4_k' is unknown; known: bf16, .*int4_g128"):
        format_named("q4_k")


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(name: str, value: float) -> None:
    weight = random_matrix(8, 128)
    weight[3, 77] = value
    with pytest.raises(CheckpointError, match=f"NaN or infinity.*{name}"):
        format_named(name).quantize(weight)


@pytest.mark.parametrize("name", [name for name in FORMAT_NAMES if name not in ("bf16", "f16", "f32")])
def test_vectors_are_refused_by_matrix_formats(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"matrices.*\[128\]"):
        format_named(name).parts((128,))
    with pytest.raises(CheckpointError, match="matrices"):
        format_named(name).quantize(torch.ones(128))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_memory_order_of_the_weight_makes_no_difference(name: str) -> None:
    weight = random_matrix(128, 256)
    flipped = weight.t().contiguous().t()
    for suffix, part in format_named(name).quantize(weight).items():
        assert torch.equal(part.view(torch.uint8), format_named(name).quantize(flipped)[suffix].view(torch.uint8))


@pytest.mark.parametrize("name", ["bf16", "f16", "f32", "fp8_e4m3_b128"])
def test_formats_without_a_search_refuse_it(name: str) -> None:
    weight = random_matrix(4, 128)
    expected = f"{name} has no scales to search: scale_search 'mse' is for int4_g32, .*int8_channel"
    with pytest.raises(RequestError, match=expected):
        format_named(name).quantize(weight, scale_search="mse")
    with pytest.raises(RequestError, match=f"{name} has no scales to search: importance is for"):
        format_named(name).quantize(weight, importance=torch.ones(128))


class TestPlain:
    @pytest.mark.parametrize("shape", [(7,), (3, 5)])
    def test_values_are_rounded_to_the_nearest(self, shape: tuple[int, ...]) -> None:
        weight = random_matrix(1, math.prod(shape)).view(shape)
        value = weight.numpy()
        for name, expected in (("f32", value), ("f16", value.astype(np.float16)), ("bf16", bf16_round(value))):
            fmt = format_named(name)
            back = fmt.dequantize(fmt.quantize(weight), shape)
            assert back.dtype == torch.float32
            np.testing.assert_array_equal(back.numpy(), expected.astype(np.float32))

    @pytest.mark.parametrize(("name", "value"), [("f16", 70000.0), ("bf16", 3.4e38)])
    def test_a_number_too_large_is_an_error_and_no_infinity(self, name: str, value: float) -> None:
        with pytest.raises(CheckpointError, match=f"too large for {name}"):
            format_named(name).quantize(torch.tensor([1.0, -value]))


class TestFp8:
    def test_every_code_has_its_published_value(self, shared: Path) -> None:
        golden = json.loads((shared / "data/derived/block_golden.json").read_text())["e4m3fn_table"]
        expected = np.array([math.nan if value is None else value for value in golden], np.float32)
        np.testing.assert_array_equal(e4m3_table().astype(np.float32), expected)
        codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
        parts = {"weight": codes, "weight_scale_inv": torch.tensor([[1.0]])}
        np.testing.assert_array_equal(FP8.dequantize(parts, (2, 128)).flatten().numpy(), expected)

    @pytest.mark.parametrize("shape", [(128, 128), (129, 127), (64, 300), (1, 1), (576, 256)])
    def test_blocks_against_numpy(self, shape: tuple[int, int]) -> None:
        weight = random_matrix(*shape)
        parts = FP8.quantize(weight)
        value = FP8.dequantize(parts, shape).numpy()
        w, scales = weight.numpy(), parts["weight_scale_inv"].numpy()
        assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                scale = np.abs(w[at]).max() / np.float32(448)
                assert scales[i, j] == scale
                codes = nearest_e4m3((w[at] / scale).clip(-448, 448))
                np.testing.assert_array_equal(parts["weight"].view(torch.uint8).numpy()[at], codes)
                # the scale is a multiplier, in spite of its name; the product is rounded once
                exact = e4m3_table()[codes] * np.float64(scale)
                np.testing.assert_array_equal(value[at], exact.astype(np.float32))

    @pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-43, 8.8e-43, 1e-38, 3.4028234e38])
    def test_extreme_blocks_stay_finite(self, amax: float) -> None:
        weight = torch.zeros(130, 130)
        weight[0, 0], weight[1, 1], weight[129, 129] = amax, -amax, 1.0
        parts = FP8.quantize(weight)
        value = FP8.dequantize(parts, (130, 130))
        assert torch.isfinite(parts["weight_scale_inv"]).all()
        assert (parts["weight_scale_inv"] > 0).all()
        assert torch.isfinite(value).all()
        assert value[129, 129] == pytest.approx(1.0)
        assert value[0, 0].item() == pytest.approx(amax, rel=2**-4, abs=1e-42)

    def test_a_block_of_zeros_has_scale_one(self) -> None:
        assert FP8.quantize(torch.zeros(3, 200))["weight_scale_inv"].tolist() == [[1.0, 1.0]]

    def test_compressed_tensors_name_of_the_scale_changes_nothing_else(self) -> None:
        """Shape [129, 300]: edge blocks both ways."""
        weight, ours, theirs = random_matrix(129, 300), Fp8Block(), Fp8Block("weight_scale")
        parts = ours.quantize(weight)
        renamed = theirs.quantize(weight)
        assert list(parts) == ["weight", "weight_scale_inv"]
        assert list(renamed) == ["weight", "weight_scale"]
        assert torch.equal(parts["weight_scale_inv"], renamed["weight_scale"])
        assert torch.equal(theirs.dequantize(renamed, (129, 300)), ours.dequantize(parts, (129, 300)))
        assert (ours.name, ours.nbytes((129, 300))) == (theirs.name, theirs.nbytes((129, 300)))
