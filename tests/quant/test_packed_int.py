"""Packed integers of 4 and 8 bits against numpy, the golden vector and the compressed-tensors package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.quant import packed_int
from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.formats import PACKED_INT, format_named
from k2lite.quant.packed_int import PackedInt, pack, unpack
from tests.quant.numbers_in_numpy import PACKED, bf16_round, exact_values, in_groups, random_matrix, stored_codes
from tests.samples import examples

MAX_CODE = {4: 7, 8: 127}
NAMES = st.sampled_from(sorted(PACKED))


def test_the_formats_are_those_of_these_tests() -> None:
    assert PACKED_INT == PACKED


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("rows", [1, 24])
def test_groups_against_numpy(name: str, rows: int) -> None:
    fmt, largest = format_named(name), MAX_CODE[PACKED[name][0]]
    weight = random_matrix(rows, 256)
    parts = fmt.quantize(weight)
    groups = in_groups(weight.numpy(), name)
    scale = bf16_round(np.abs(groups).max(-1) / np.float32(largest))
    np.testing.assert_array_equal(parts["weight_scale"].float().numpy(), scale)
    codes = np.rint(groups / scale[..., None]).clip(-largest, largest).astype(np.int64).reshape(rows, 256)
    np.testing.assert_array_equal(stored_codes(parts, name), codes)
    assert parts["weight_shape"].tolist() == [rows, 256]
    exact = exact_values(parts, name).reshape(rows, 256)
    np.testing.assert_array_equal(fmt.dequantize(parts, (rows, 256)).numpy(), exact.astype(np.float32))


def test_the_published_example(shared: Path) -> None:
    golden = json.loads((shared / "data/derived/block_golden.json").read_text())["compressed_tensors_int4"]
    codes, words = torch.tensor(golden["codes"]), torch.tensor(golden["packed_int32"], dtype=torch.int32)
    assert torch.equal(pack(codes, 4), words)
    assert torch.equal(pack(codes.t().contiguous().t(), 4), words)
    assert torch.equal(unpack(words, 4), codes.float())


@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 40),
    words=st.integers(1, 40),
    dtype=st.sampled_from([torch.int8, torch.int64, torch.float32]),
)
@settings(max_examples=examples(60), deadline=None)
def test_packing_equals_the_compressed_tensors_package(
    seed: int, bits: int, rows: int, words: int, dtype: torch.dtype
) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 1 << (bits - 1)
    shape = rows, words * 32 // bits
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-half, half, shape, dtype=np.int8))
    expected = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes.to(dtype), bits), expected)
    assert torch.equal(pack(codes.to(dtype).t().contiguous().t(), bits), expected)
    assert torch.equal(unpack(expected, bits), helpers.unpack_from_int32(expected, bits, codes.shape).float())
    assert torch.equal(unpack(expected, bits), codes.float())


@given(seed=st.integers(0, 2**32), name=NAMES, rows=st.integers(1, 9), groups=st.integers(1, 3), big=st.booleans())
@settings(max_examples=examples(40), deadline=None)
def test_any_shape_of_whole_groups_comes_back_within_half_a_step(
    seed: int, name: str, rows: int, groups: int, big: bool
) -> None:
    columns = groups * (PACKED[name][1] or (100 if big else 4))
    weight = random_matrix(rows, columns, seed)
    fmt = format_named(name)
    parts = fmt.quantize(weight)
    assert {s: (p.dtype, tuple(p.shape)) for s, p in parts.items()} == fmt.parts((rows, columns))
    assert stored_codes(parts, name).shape == (rows, columns)
    assert np.abs(stored_codes(parts, name)).max() <= MAX_CODE[PACKED[name][0]]
    off = np.abs(exact_values(parts, name) - in_groups(weight.double().numpy(), name))
    # a scale that BF16 rounded down by up to 2^-9 leaves the largest weight a part of a step beyond the grid
    assert (off <= parts["weight_scale"].double().numpy()[..., None] * 0.5001).all()


@given(seed=st.integers(0, 2**32), name=NAMES, scale_search=st.sampled_from(["amax", "mse"]))
@settings(max_examples=examples(30), deadline=None)
def test_what_lies_on_the_grid_comes_back_exactly(seed: int, name: str, scale_search: packed_int.ScaleSearch) -> None:
    """Quantization-aware training leaves codes -7..7 whose largest is 7: quantizing those again loses nothing."""
    fmt, (bits, size) = format_named(name), PACKED[name]
    random = np.random.default_rng(seed)
    codes = random.integers(-MAX_CODE[bits], MAX_CODE[bits] + 1, (4, 256 // (size or 256), size or 256))
    codes[..., random.integers(codes.shape[-1])] = random.choice([-1, 1], codes.shape[:-1]) * MAX_CODE[bits]
    scale = torch.from_numpy(10.0 ** random.uniform(-30, 30, codes.shape[:-1])).to(torch.bfloat16)
    weight = (torch.from_numpy(codes) * scale.float()[..., None]).float().view(4, 256)
    parts = fmt.quantize(weight, scale_search=scale_search)
    assert torch.equal(parts["weight_scale"], scale)
    np.testing.assert_array_equal(stored_codes(parts, name), codes.reshape(4, 256))
    assert torch.equal(fmt.dequantize(parts, (4, 256)), weight)


@pytest.mark.parametrize("scale_search", ["amax", "mse"])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40, 1e38, 3.4028234e38])
def test_extreme_groups_stay_finite(name: str, amax: float, scale_search: packed_int.ScaleSearch) -> None:
    fmt = format_named(name)
    weight = torch.zeros(2, 128)
    weight[0, 5], weight[1, 40] = -amax, 1.0
    parts = fmt.quantize(weight, scale_search=scale_search)
    value = fmt.dequantize(parts, (2, 128))
    assert torch.isfinite(parts["weight_scale"]).all()
    assert (parts["weight_scale"] != 0).all()
    assert torch.isfinite(value).all()
    assert value[1, 40] == pytest.approx(1.0, rel=2**-8)
    assert value[0, 5].item() == pytest.approx(-amax, rel=2**-7, abs=2e-40)
    if amax == 0:
        assert parts["weight_scale"][0].unique().tolist() == [1.0]


@pytest.mark.parametrize(("name", "lowest"), [("int4_g32", -8), ("int8_channel", -128)])
def test_the_lowest_code_is_read(name: str, lowest: int) -> None:
    parts = {
        "weight_packed": torch.zeros(1, 32 * PACKED[name][0] // 32, dtype=torch.int32),
        "weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
    }
    assert format_named(name).dequantize(parts, (1, 32)).unique().tolist() == [lowest / 2]


@pytest.mark.parametrize(
    ("name", "columns", "multiple"),
    [(name, size - 8, size) for name, (_, size) in PACKED.items() if size]
    + [("int4_g32", 200, 32), ("int8_g128", 64, 128), ("int8_g128", 200, 128), ("int8_channel", 30, 4)],
)
def test_rows_that_are_no_whole_groups_are_refused(name: str, columns: int, multiple: int) -> None:
    message = f"{name} needs rows of a multiple of {multiple} columns, found {columns}"
    with pytest.raises(CheckpointError, match=message):
        format_named(name).quantize(torch.ones(8, columns))
    with pytest.raises(CheckpointError, match=message):
        format_named(name).parts((8, columns))


@pytest.mark.parametrize("scale_search", ["amax", "mse"])
@pytest.mark.parametrize("name", ["int4_g32", "int8_g128", "int8_channel"])
def test_rows_are_worked_on_in_blocks_and_alone_give_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, scale_search: packed_int.ScaleSearch
) -> None:
    weight, importance, fmt = random_matrix(10, 256).to(torch.bfloat16), torch.rand(256), PackedInt(name)
    options = {"scale_search": scale_search, "importance": importance if scale_search == "mse" else None}
    whole = fmt.quantize(weight.float(), **options)
    sizes: list[int] = []
    inner = PackedInt.scales

    def seen(self: PackedInt, groups: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(groups.numel())
        return inner(self, groups, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedInt, "scales", seen)
    monkeypatch.setattr(packed_int, "BLOCK_WEIGHTS", 1000)
    blocks = fmt.quantize(weight, **options)
    assert sizes == [768, 768, 768, 256]
    for suffix, part in whole.items():
        assert torch.equal(blocks[suffix], part), suffix
    monkeypatch.setattr(packed_int, "BLOCK_WEIGHTS", 1)
    assert torch.equal(fmt.quantize(weight, **options)["weight_scale"], whole["weight_scale"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_search": "best"}, "scale_search is 'best'; known: amax, mse"),
        ({"importance": torch.ones(64)}, "importance has no effect with scale_search 'amax'; it needs 'mse'"),
        ({"scale_search": "mse", "importance": torch.ones(63)}, r"importance has the shape \[63\], expected \[64\]"),
        ({"scale_search": "mse", "importance": torch.ones(1, 64)}, r"importance has the shape \[1, 64\]"),
        ({"scale_search": "mse", "importance": torch.full((64,), -1.0)}, "negative, NaN or infinite"),
        ({"scale_search": "mse", "importance": torch.full((64,), torch.inf)}, "negative, NaN or infinite"),
        ({"scale_search": "mse", "importance": torch.full((64,), torch.nan)}, "negative, NaN or infinite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        format_named("int4_g32").quantize(torch.ones(2, 64), **options)  # type: ignore[arg-type]
