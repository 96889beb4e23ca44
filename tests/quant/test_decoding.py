"""The compiled loops that read weights, against QuantFormat.dequantize, which tests compare with numpy; how they are
compiled."""

from __future__ import annotations

import time
from typing import Any

import numba
import numpy as np
import pytest
import torch

from k2lite.quant import compiling
from k2lite.quant.decoding import decoded, decoded_spans
from k2lite.quant.formats import FORMAT_NAMES, format_named
from k2lite.quant.quantize_kernels import measure
from k2lite.quant.types import QuantTensor
from tests.quant.numbers_in_numpy import random_matrix


@pytest.mark.parametrize("step", [1, 5, 128, 1000])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_spans_of_rows_are_those_of_the_whole(name: str, step: int) -> None:
    fmt = format_named(name)
    tensor = QuantTensor(fmt, (140, 384), fmt.quantize(random_matrix(140, 384)))
    spans = [span.clone() for span in decoded_spans(tensor, step)]
    assert [len(span) for span in spans] == [min(step, 140 - at) for at in range(0, 140, step)]
    assert torch.equal(torch.cat(spans), tensor.dequantize())


def test_every_fp8_code_and_vectors() -> None:
    fp8, bf16 = format_named("fp8_e4m3_b128"), format_named("bf16")
    codes = torch.arange(256, dtype=torch.uint8).repeat(2).view(2, 256).view(torch.float8_e4m3fn)
    for scale in (1.0, 3e38, 1e-44):
        parts = {"weight_scale_inv": torch.tensor([[scale, 0.37]]), "weight": codes}
        tensor = QuantTensor(fp8, (2, 256), parts)
        np.testing.assert_array_equal(decoded(tensor).numpy(), tensor.dequantize().numpy())
    vector = QuantTensor(bf16, (7,), {"weight": torch.randn(7).to(torch.bfloat16)})
    assert torch.equal(decoded(vector), vector.dequantize())


@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 128), (5, 1000)])
def test_sums_against_float64(shape: tuple[int, int]) -> None:
    weights, made = random_matrix(*shape).numpy(), random_matrix(*shape, seed=1).numpy()
    sums = np.empty((shape[0], 3))
    measure(weights, made, sums)
    a, b = weights.astype(np.float64), made.astype(np.float64)
    np.testing.assert_allclose(sums, np.stack(((a * a).sum(1), (b * b).sum(1), (a * b).sum(1)), 1), rtol=1e-12)


def test_without_a_place_for_the_cache_kernels_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numba.njit

    def njit(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available for file 'x.py'")
        return whole(**options)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiling.kernel(lambda x: x + x)(21) == 42


def test_slow_compilation_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiling, "PATIENCE_S", 0.01)
    compiling._said.clear()
    for _ in range(2):
        with compiling._SlowCompilation():
            time.sleep(0.1)
    assert capsys.readouterr().err.splitlines() == [
        "k2lite: compiling kernels for this processor, which takes a while the first time"
    ]
