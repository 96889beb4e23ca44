"""A row at a time gives the bytes of the steps one after another, and refuses what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from k2lite.quant.errors import CheckpointError
from k2lite.quant.formats import PACKED_INT, format_named
from k2lite.quant.one_pass import in_one_pass
from k2lite.quant.types import QuantTensor
from tests.quant.numbers_in_numpy import random_matrix

SOURCES = ("fp8_e4m3_b128", "bf16")


def stored(source: str, rows: int, columns: int) -> tuple[QuantTensor, torch.Tensor]:
    """A weight with rows of zeros and of tiny numbers, as stored, and its values by the format's own torch code."""
    weight = random_matrix(rows, columns, seed=rows)
    weight[1] = 0
    weight[2] *= 1e-30
    kind = format_named(source)
    tensor = QuantTensor(kind, (rows, columns), kind.quantize(weight))
    return tensor, tensor.dequantize()


@pytest.mark.parametrize("target", PACKED_INT)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rows", [5, 130])
def test_the_bytes_and_sums_are_those_of_the_steps(source: str, target: str, rows: int) -> None:
    tensor, values = stored(source, rows, 384)
    kind = format_named(target)
    made = in_one_pass(tensor, kind)
    assert made is not None
    expected = kind.quantize(values)
    assert made[0].keys() == expected.keys() - {"weight_shape"}
    for suffix, part in made[0].items():
        assert part.dtype == expected[suffix].dtype
        assert torch.equal(part, expected[suffix]), suffix
    before, after = values.double().numpy(), kind.dequantize(expected, (rows, 384)).double().numpy()
    np.testing.assert_allclose(made[1], [(before**2).sum(), (after**2).sum(), (before * after).sum()], rtol=1e-12)


def test_other_formats_have_no_such_way() -> None:
    tensor, _ = stored("bf16", 5, 384)
    assert in_one_pass(tensor, format_named("fp8_e4m3_b128")) is None
    plain = QuantTensor(format_named("f32"), (5, 384), {"weight": torch.zeros(5, 384)})
    assert in_one_pass(plain, format_named("int4_g32")) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    tensor, _ = stored("bf16", 5, 384)
    tensor.parts["weight"][3, 7] = value
    with pytest.raises(CheckpointError, match="NaN or infinity and can't be quantized to int4_g32"):
        in_one_pass(tensor, format_named("int4_g32"))
