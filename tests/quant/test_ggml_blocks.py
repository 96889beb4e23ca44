"""GGUF's blocks against the golden vectors and the gguf package, and codes that are copied, not rounded anew."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.formats import format_named
from k2lite.quant.ggml_blocks import (
    BLOCKS,
    WRITTEN,
    GgmlBlocks,
    ScaleCount,
    format_of_type,
    packed_as_blocks,
)
from k2lite.quant.ggml_types import BY_NAME, GGML_TYPES
from k2lite.quant.plain import PLAIN_DTYPES
from k2lite.quant.types import QuantTensor
from tests.quant.numbers_in_numpy import random_matrix

INT4 = format_named("int4_g32")


def golden(shared: Path) -> list[dict[str, object]]:
    blocks = json.loads((shared / "data/derived/block_golden.json").read_text())["blocks"]
    return [block for block in blocks if block["type"].lower() in BY_NAME]


def decoded(block: dict[str, object], key: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(str(block[key])), dtype).copy()


def quantized(weight: torch.Tensor, name: str) -> torch.Tensor:
    return GgmlBlocks(name).quantize(weight)[BLOCKS]


def test_the_table_of_types_is_llama_cpps() -> None:
    for kind in GGML_TYPES.values():
        package = gguf.GGMLQuantizationType(kind.id)
        assert package.name.lower() == kind.name
        assert gguf.GGML_QUANT_SIZES[package] == (kind.elements, kind.nbytes)


def test_every_golden_block_is_read(shared: Path) -> None:
    blocks = golden(shared)
    assert {"q4_0", "q8_0", "bf16", "mxfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"} <= {
        str(block["type"]).lower() for block in blocks
    }
    for block in blocks:
        stored_as, raw = format_of_type(BY_NAME[str(block["type"]).lower()]), decoded(block, "raw_b64", np.uint8)
        wanted = decoded(block, "deq_f32_b64", np.float32)
        tensor = torch.from_numpy(raw)
        if stored_as.name in PLAIN_DTYPES:
            parts = {"weight": tensor.view(PLAIN_DTYPES[stored_as.name])[None]}
        else:
            parts = {BLOCKS: tensor[None]}
        values = stored_as.dequantize(parts, (1, wanted.size)).numpy()[0]
        assert values.tobytes() == wanted.tobytes(), block["type"]


def test_every_golden_block_that_we_write(shared: Path) -> None:
    written = 0
    for block in golden(shared):
        name = str(block["type"]).lower()
        if name in (*WRITTEN, "bf16"):
            weight = torch.from_numpy(decoded(block, "quant_in_f32_b64", np.float32))[None]
            stored_as = format_of_type(BY_NAME[name])
            (made,) = stored_as.quantize(weight).values()
            assert made.view(torch.uint8).numpy().tobytes() == base64.b64decode(str(block["quant_out_b64"])), name
            written += 1
    assert written == 3


@pytest.mark.parametrize("name", WRITTEN)
def test_quantize_is_llama_cpps_bit_for_bit(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    weight = random_matrix(300, 1024)
    weight[0, :32] = 0  # a group of zeros
    weight[1, :32] = torch.tensor([3.0, -3.0] * 16)  # which of equals is the farthest
    weight[2, :32] = torch.tensor([-3.0, 3.0] * 16)
    weight[3] *= 1e-7  # scales that F16 holds as subnormal numbers
    weight[4, :32] = torch.arange(32) * 0.5  # halves
    weight[4, 31] = 127
    made = quantized(weight, name)
    assert made.numpy().tobytes() == gguf.quantize(weight.numpy(), kind).tobytes()
    values = GgmlBlocks(name).dequantize({BLOCKS: made}, (300, 1024))
    assert values.numpy().tobytes() == gguf.dequantize(made.numpy(), kind).tobytes()


def test_numbers_so_small_that_their_scale_has_no_inverse_become_zero() -> None:
    weight = torch.full((1, 32), 1e-44)
    for name in WRITTEN:
        assert not GgmlBlocks(name).dequantize({BLOCKS: quantized(weight, name)}, (1, 32)).any()


def test_what_can_t_be_written_is_refused() -> None:
    with pytest.raises(CheckpointError, match="needs rows of a multiple of 32 columns, found 48"):
        GgmlBlocks("q4_0").quantize(torch.zeros(2, 48))
    with pytest.raises(CheckpointError, match="which GGUF's F16 can't hold"):
        GgmlBlocks("q8_0").quantize(torch.full((1, 32), 1e8))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        GgmlBlocks("q8_0").quantize(torch.full((1, 32), torch.nan))
    with pytest.raises(RequestError, match="q4_k is read and not written"):
        GgmlBlocks("q4_k").quantize(torch.zeros(1, 256))
    with pytest.raises(RequestError, match="no scales to search"):
        GgmlBlocks("q4_0").quantize(torch.zeros(1, 32), scale_search="mse")


def test_int4_to_q4_0_and_back_is_the_identity_up_to_the_cast_of_scales() -> None:
    parts = INT4.quantize(random_matrix(64, 512))
    scales = parts["weight_scale"]
    codes = torch.randint(0, 1 << 32, parts["weight_packed"].shape, dtype=torch.int64)  # -8 occurs too
    parts["weight_packed"] = (codes - (1 << 31)).to(torch.int32)
    scales[1] *= -1  # as a search may find them
    scales[2, :4] = torch.tensor([2.0**-17, 2.0**-18 * 1.9921875, 2.0**-24, 2.0**-26])
    count = ScaleCount()
    blocks = packed_as_blocks(QuantTensor(INT4, (64, 512), parts), GgmlBlocks("q4_0"), count)
    assert blocks is not None
    # of those four only the second (its last bit) and the fourth (all of it) don't fit F16
    assert (count.scales, count.changed, count.zeroed) == (64 * 16, 2, 1)
    exact = scales.float().numpy().astype(np.float16).astype(np.float32)[:, :, None]
    stored = parts["weight_packed"].numpy().view(np.uint8)
    signed = np.stack((stored & 15, stored >> 4), axis=-1).reshape(64, 16, 32).astype(np.float32) - 8
    wanted = (signed * exact).reshape(64, 512)
    assert (gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0) == wanted).all()
    back = GgmlBlocks("q4_0").recode(QuantTensor(GgmlBlocks("q4_0"), (64, 512), {BLOCKS: blocks}), INT4)
    assert back is not None
    assert torch.equal(back["weight_packed"], parts["weight_packed"])
    assert back["weight_shape"].tolist() == [64, 512]
    differ = back["weight_scale"] != scales
    assert differ.nonzero().tolist() == [[2, 1], [2, 3]]


@pytest.mark.parametrize("source", ["int4_g64", "int4_g128", "int8_g128", "int8_channel"])
def test_codes_of_other_groups_are_copied_with_their_scale_repeated(source: str) -> None:
    stored_as = format_named(source)
    tensor = QuantTensor(stored_as, (40, 256), stored_as.quantize(random_matrix(40, 256)))
    for name in WRITTEN:
        blocks = packed_as_blocks(tensor, GgmlBlocks(name), ScaleCount())
        if name == "q4_0" and source.startswith("int8"):
            assert blocks is None
            continue
        assert blocks is not None
        values = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
        assert np.array_equal(values, tensor.dequantize().numpy())


def test_a_scale_that_f16_can_t_hold_is_an_error() -> None:
    parts = INT4.quantize(random_matrix(4, 64))
    parts["weight_scale"][3, 1] = 1e5
    with pytest.raises(CheckpointError, match="a scale of int4_g32 is 99840, which GGUF's F16 can't hold"):
        packed_as_blocks(QuantTensor(INT4, (4, 64), parts), GgmlBlocks("q4_0"), ScaleCount())


def test_only_q4_0_is_taken_over_into_int4() -> None:
    for name, target in (("q8_0", "int4_g32"), ("q4_0", "int4_g64"), ("q4_0", "int8_g128")):
        blocks = {BLOCKS: quantized(random_matrix(4, 128), name)}
        assert GgmlBlocks(name).recode(QuantTensor(GgmlBlocks(name), (4, 128), blocks), format_named(target)) is None
