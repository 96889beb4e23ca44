"""Seeded weights and inputs for tests of the CPU backend, and the error against float64."""

from __future__ import annotations

import torch

from k2lite.backends.cpu.backend import CpuBackend
from k2lite.quant.formats import format_named
from k2lite.quant.types import ExpertWeights, QuantTensor

INTEGER = ("int4_g32", "int4_g64", "int4_g128", "int8_g128", "int8_channel")
FLOAT = ("bf16", "fp8_e4m3_b128", "f16", "f32")
# The columns of a row come in multiples of this.
STEP = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128, "int8_g128": 128, "int8_channel": 4}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(format: str, rows: int, columns: int, seed: int) -> QuantTensor:
    form = format_named(format)
    return QuantTensor(form, (rows, columns), form.quantize(normal(rows, columns, seed=seed) * columns**-0.5))


def expert(format: str, hidden: int, width: int, seed: int) -> ExpertWeights:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return ExpertWeights(*(weight(format, *shape, seed=seed + i) for i, shape in enumerate(shapes)))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def exact_product(x: torch.Tensor, matrix: QuantTensor) -> torch.Tensor:
    return x.double() @ matrix.dequantize().double().T


def exact_ffn(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    gate, up = exact_product(x, weights.gate_proj), exact_product(x, weights.up_proj)
    return (gate / (1 + torch.exp(-gate)) * up) @ weights.down_proj.dequantize().double().T


def product() -> list[list[float]]:
    """One product on a backend of its own, for a child process to repeat."""
    with_three = CpuBackend(threads=3)
    return with_three.linear(normal(2, 4096, seed=2), weight("int4_g32", 96, 4096, 1)).tolist()
