"""Matrix products and expert blocks: against float64, the same bits for any company, and no silent number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.backends.base import Assignment
from k2lite.backends.cpu.backend import CpuBackend
from k2lite.quant.types import ExpertWeights, QuantTensor
from tests.backends.cpu.samples import (
    FLOAT,
    INTEGER,
    STEP,
    exact_ffn,
    exact_product,
    expert,
    normal,
    relative_error,
    weight,
)
from tests.samples import examples


@given(
    format=st.sampled_from(INTEGER + FLOAT),
    rows=st.integers(1, 70),
    columns=st.integers(1, 9),
    tokens=st.integers(0, 21),
    seed=st.integers(0, 1000),
)
@settings(max_examples=examples(60), deadline=None)
def test_products_of_odd_shapes(
    cpu: CpuBackend, rounded: CpuBackend, format: str, rows: int, columns: int, tokens: int, seed: int
) -> None:
    step = STEP.get(format, 37)
    matrix, x = weight(format, rows, columns * step, seed), normal(tokens, columns * step, seed=seed + 1)
    for backend, bar in ((cpu, 0.03 if format in INTEGER else 1e-6), (rounded, 0.01 if format in INTEGER else 1e-6)):
        found = backend.linear(x, matrix)
        assert found.shape == (tokens, rows)
        if tokens:
            # a few columns give a few roundings' luck: the bar is on the error beside |x| |w|
            size = (x.double().abs() @ matrix.dequantize().double().abs().T).norm() + 1e-30
            assert (found - exact_product(x, matrix)).norm() / size < bar
        for token in range(tokens):
            assert torch.equal(backend.linear(x[token : token + 1], matrix)[0], found[token])


def test_an_integer_sum_is_exact(cpu: CpuBackend) -> None:
    """Inputs that int8 holds exactly and scales that are powers of two: nothing may be rounded."""
    generator = torch.Generator().manual_seed(3)
    for format in INTEGER:
        matrix = weight(format, 33, 512, 4)
        scale = matrix.parts["weight_scale"]
        scale.copy_(torch.exp2(torch.randint(-3, 3, scale.shape, generator=generator).float()))
        x = torch.randint(-127, 128, (9, 512), generator=generator).float()
        x[:, ::32] = 127.0
        assert torch.equal(cpu.linear(x, matrix).double(), exact_product(x, matrix)), format


@pytest.mark.parametrize("format", ["int4_g32", "int8_channel", "fp8_e4m3_b128", "bf16"])
def test_kernels_take_any_offset_of_eight_bytes(cpu: CpuBackend, format: str) -> None:
    matrix, x = weight(format, 21, 256, 5), normal(6, 256, seed=6)
    moved = {}
    for suffix, part in matrix.parts.items():
        room = torch.empty(part.nbytes + 8, dtype=torch.uint8)[8:].view(part.dtype).view(part.shape)
        moved[suffix] = room.copy_(part)
    assert torch.equal(cpu.linear(x, QuantTensor(matrix.format, matrix.shape, moved)), cpu.linear(x, matrix))


@pytest.mark.parametrize(("format", "bar"), [("int4_g32", 0.013), ("fp8_e4m3_b128", 0.013), ("int8_g128", 0.013)])
def test_expert_blocks_are_as_accurate_as_promised(
    cpu: CpuBackend, rounded: CpuBackend, format: str, bar: float
) -> None:
    weights, x = expert(format, 1024, 512, 7), normal(16, 1024, seed=80)
    assert relative_error(cpu.mlp(x, weights), exact_ffn(x, weights)) < bar
    assert relative_error(rounded.mlp(x, weights), exact_ffn(x, weights)) < 0.004


EXPERTS = {
    "int4": [expert("int4_g32", 160, 96, seed) for seed in (10, 20, 30)],
    "int8": [expert("int8_channel", 68, 36, seed) for seed in (10, 20, 30)],
    "fp8": [expert("fp8_e4m3_b128", 130, 131, seed) for seed in (10, 20, 30)],
    "mixed": [
        ExpertWeights(weight("fp8_e4m3_b128", 64, 96, s), weight("int4_g32", 64, 96, s), weight("f32", 96, 64, s))
        for s in (10, 20, 30)
    ],
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_neither_company_nor_order_nor_threads_change_an_expert(cpu: CpuBackend, name: str, tokens: int) -> None:
    experts = EXPERTS[name]
    x = normal(tokens, experts[0].gate_proj.shape[1], seed=tokens)
    ids = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(t))[:2].sort().values
                       for t in range(tokens)])  # fmt: skip

    def run(backend: CpuBackend, rows: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
        out = torch.full((len(rows), 2, x.shape[1]), float("nan"))
        chosen = ids[rows]
        for group in groups:
            work = [Assignment(experts[number], *torch.where(chosen == number)) for number in group]
            backend.expert_ffn(x[rows], work, out).wait()
        return out

    everyone = torch.arange(tokens)
    expected = run(cpu, everyone, [[0, 1, 2]])
    assert expected.isfinite().all()
    assert torch.equal(run(cpu, everyone, [[2], [0], [1]]), expected)
    for threads in (1, 3):
        assert torch.equal(run(CpuBackend(threads=threads), everyone, [[1, 0, 2]]), expected)
    for token in range(0, tokens, 7):
        assert torch.equal(run(cpu, torch.tensor([token]), [[0, 1, 2]])[0], expected[token])
    for slot in range(2):
        for token in range(0, tokens, 9):
            alone = cpu.mlp(x[token : token + 1], experts[int(ids[token, slot])])[0]
            assert torch.equal(alone, expected[token, slot])


@pytest.mark.parametrize("format", [*INTEGER, *FLOAT])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 9])
def test_what_is_no_number_is_never_silent(cpu: CpuBackend, format: str, value: float, tokens: int) -> None:
    matrix, x = weight(format, 19, 256, 9), normal(tokens, 256, seed=10)
    x[0, 77] = value
    found = cpu.linear(x, matrix)
    assert not found[0].isfinite().any()
    if value != value:
        assert found[0].isnan().all()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("format", ["int4_g32", "int8_g128", "fp8_e4m3_b128", "bf16"])
def test_zeros_denormals_and_outliers(cpu: CpuBackend, format: str) -> None:
    matrix = weight(format, 19, 256, 9)
    assert not cpu.linear(torch.zeros(3, 256), matrix).any()
    for size in (1e-45, 3e-44, 1e-39, 1e-37, 1e30):
        x = normal(5, 256, seed=11).clamp(-3, 3) * size
        found = cpu.linear(x, matrix)
        assert found.isfinite().all()
        assert (found - exact_product(x, matrix)).abs().max() <= max(0.05 * 16 * size, 256 * 1.5e-45), size
    x = normal(5, 256, seed=12)
    x[:, 40] *= 1000  # an outlier spoils its own group of 32 only
    small = x.clone()
    small[:, 32:64] = 0
    assert relative_error(cpu.linear(small, matrix), exact_product(small, matrix)) < 0.013
    assert relative_error(cpu.linear(x, matrix), exact_product(x, matrix)) < 0.013
