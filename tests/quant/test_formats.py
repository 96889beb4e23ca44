"""Number formats against numpy, the golden vectors and the compressed-tensors package."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.quant.errors import CheckpointError
from k2lite.quant.formats import FORMAT_NAMES, INT4_NAMES, QuantFormat, format_named
from k2lite.quant.int4 import pack, unpack

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


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, nearest even, as 16 bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_round(x: np.ndarray) -> np.ndarray:
    return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32)


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    # rows of very different sizes, so that a wrong block or group is seen
    sizes = 10.0 ** generator.uniform(-3, 3, (rows, 1))
    return torch.from_numpy((generator.standard_normal((rows, columns)) * sizes).astype(np.float32))


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


class TestInt4:
    @pytest.mark.parametrize("name", INT4_NAMES)
    @pytest.mark.parametrize("rows", [1, 24])
    def test_groups_against_numpy(self, name: str, rows: int) -> None:
        fmt, size = format_named(name), INT4_NAMES[name]
        weight = random_matrix(rows, 256)
        parts = fmt.quantize(weight)
        groups = weight.numpy().reshape(rows, -1, size)
        scale = bf16_round(np.abs(groups).max(-1) / np.float32(7))
        np.testing.assert_array_equal(parts["weight_scale"].float().numpy(), scale)
        codes = np.rint(groups / scale[..., None]).clip(-7, 7).astype(np.int64).reshape(rows, 256)
        packed = parts["weight_packed"].numpy().view(np.uint8)  # two codes a byte, the lower column in the low nibble
        np.testing.assert_array_equal((packed & 15).astype(np.int64) - 8, codes[:, 0::2])
        np.testing.assert_array_equal((packed >> 4).astype(np.int64) - 8, codes[:, 1::2])
        assert parts["weight_shape"].tolist() == [rows, 256]
        exact = codes.reshape(groups.shape) * scale.astype(np.float64)[..., None]
        np.testing.assert_array_equal(
            fmt.dequantize(parts, (rows, 256)).numpy(), exact.reshape(rows, 256).astype(np.float32)
        )

    def test_the_published_example(self, shared: Path) -> None:
        golden = json.loads((shared / "data/derived/block_golden.json").read_text())["compressed_tensors_int4"]
        codes, words = torch.tensor(golden["codes"]), torch.tensor(golden["packed_int32"], dtype=torch.int32)
        assert torch.equal(pack(codes), words)
        assert torch.equal(pack(codes.t().contiguous().t()), words)
        assert torch.equal(unpack(words), codes.float())

    def test_packing_equals_the_compressed_tensors_package(self) -> None:
        helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
        codes = torch.from_numpy(np.random.default_rng(1).integers(-8, 8, (48, 256), dtype=np.int8))
        words = helpers.pack_to_int32(codes, 4)
        assert torch.equal(pack(codes), words)
        assert torch.equal(unpack(words), helpers.unpack_from_int32(words, 4, codes.shape).float())

    @given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(INT4_NAMES)))
    @settings(max_examples=30, deadline=None)
    def test_what_lies_on_moonshots_grid_comes_back_exactly(self, seed: int, name: str) -> None:
        """Quantization-aware training leaves codes -7..7 whose largest is 7: quantizing those again loses nothing."""
        fmt, size = format_named(name), INT4_NAMES[name]
        random = np.random.default_rng(seed)
        codes = random.integers(-7, 8, (4, 256 // size, size))
        codes[..., random.integers(size)] = random.choice([-7, 7], codes.shape[:-1])
        scale = torch.from_numpy(10.0 ** random.uniform(-30, 30, codes.shape[:-1])).to(torch.bfloat16)
        weight = (torch.from_numpy(codes) * scale.float()[..., None]).float().view(4, 256)
        parts = fmt.quantize(weight)
        assert torch.equal(parts["weight_scale"], scale)
        assert torch.equal(unpack(parts["weight_packed"]), torch.from_numpy(codes.reshape(4, 256)).float())
        assert torch.equal(fmt.dequantize(parts, (4, 256)), weight)

    @given(seed=st.integers(0, 2**32))
    @settings(max_examples=30, deadline=None)
    def test_the_error_is_at_most_half_a_step(self, seed: int) -> None:
        fmt = format_named("int4_g32")
        weight = random_matrix(4, 64, seed)
        parts = fmt.quantize(weight)
        step = parts["weight_scale"].float().repeat_interleave(32, 1)
        # a scale that BF16 rounded down by up to 2^-9 leaves the largest weight 7 * 2^-9 of a step beyond the grid
        assert ((fmt.dequantize(parts, (4, 64)) - weight).abs() <= step * 0.5001).all()

    @pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40, 3.4028234e38])
    def test_extreme_groups_stay_finite(self, amax: float) -> None:
        fmt = format_named("int4_g32")
        weight = torch.zeros(1, 64)
        weight[0, 5], weight[0, 40] = -amax, 1.0
        parts = fmt.quantize(weight)
        value = fmt.dequantize(parts, (1, 64))
        assert (parts["weight_scale"] > 0).all()
        assert torch.isfinite(value).all()
        assert value[0, 40] == pytest.approx(1.0, rel=2**-8)
        assert value[0, 5].item() == pytest.approx(-amax, rel=2**-7, abs=1e-40)

    def test_code_minus_eight_is_read(self) -> None:
        fmt = format_named("int4_g32")
        parts = {
            "weight_packed": torch.zeros(1, 4, dtype=torch.int32),
            "weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
        }
        assert fmt.dequantize(parts, (1, 32)).unique().tolist() == [-4.0]

    @pytest.mark.parametrize("name", INT4_NAMES)
    def test_rows_that_are_no_whole_groups_are_refused(self, name: str) -> None:
        fmt: QuantFormat = format_named(name)
        with pytest.raises(CheckpointError, match=f"multiple of {INT4_NAMES[name]} columns, found 200"):
            fmt.quantize(torch.ones(8, 200))
