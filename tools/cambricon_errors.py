"""The error of each way that the Cambricon backend multiplies an expert, on the demo model's own experts and inputs.

    python tools/cambricon_errors.py

Truth is the shipped FP8 expert in float64. Arithmetic is the stand-in's of tests/: not run on hardware. The demo's down
projection has 64 inputs, too few for groups of 128: there W4A8 is gate and up only, and down is dequantized INT4.
"""

from __future__ import annotations

import numpy as np
import torch

import k2lite
from k2lite.backends.base import Assignment
from k2lite.backends.cambricon.adapter import Operations
from k2lite.backends.cambricon.backend import DECODE_TOKENS, CambriconBackend
from k2lite.backends.cambricon.spec import Prefill
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.quant.formats import format_named
from k2lite.quant.types import ExpertWeights, QuantTensor
from k2lite.recording import Recorder
from k2lite.testing import oracle
from tests.backends.cambricon import emulator
from tests.backends.plain_runtime import PlainRuntime

QUESTION = "How many centimeters are 12 meters? Please send a letter with city Torino and count 3."
# way: formats of gate, up and down, and how a prompt multiplies; None: token by token
WAYS: dict[str, tuple[tuple[str, str, str], Prefill | None]] = {
    "weight_only_quant_matmul, int4_g64": (("int4_g64", "int4_g64", "int4_g64"), None),
    "weight_only_quant_matmul, int8_channel": (("int8_channel",) * 3, None),
    "group_gemm, int4_g64 dequantized": (("int4_g64", "int4_g64", "int4_g64"), "dequantized"),
    "group_gemm, int8_channel dequantized": (("int8_channel",) * 3, "dequantized"),
    "group_gemm, int4_g128 (down int4_g64) dequantized": (("int4_g128", "int4_g128", "int4_g64"), "dequantized"),
    "smooth_quant_group_gemm W4A8, int4_g128 (down int4_g64)": (("int4_g128", "int4_g128", "int4_g64"), "w4a8"),
}


class Inputs(Recorder):
    """What each expert of the demo reads."""

    def __init__(self) -> None:
        self.rows: dict[str, torch.Tensor] = {}

    def expert(self, module: str, x: torch.Tensor, rows: torch.Tensor) -> None:
        self.rows.setdefault(module, x[rows].clone())


def main() -> None:
    inputs = Inputs()
    engine = k2lite.load(DEMO_FOLDER, backend="cpu", context=256, recorder=inputs)
    engine.logits(engine.tokenizer.render([{"role": "user", "content": QUESTION}]).ids)
    weights = stored_experts(engine, sorted(inputs.rows)[:: max(1, len(inputs.rows) // 48)])
    for way, (formats, prefill) in WAYS.items():
        wrong = size = rounded = 0.0
        for module, expert in weights.items():
            x = inputs.rows[module]
            made = requantized(expert, formats)
            truth = oracle.mlp(oracle.exact(x), expert).value
            wrong += float(np.square(oracle.exact(multiplied(x, made, prefill)) - truth).sum())
            rounded += float(np.square(oracle.mlp(oracle.exact(x), made).value - truth).sum())
            size += float(np.square(truth).sum())
        print(f"{way:<58} {(wrong / size) ** 0.5:.4f}, of which weights alone {(rounded / size) ** 0.5:.4f}")


def stored_experts(engine: k2lite.Engine, modules: list[str]) -> dict[str, ExpertWeights]:
    """The demo's experts by name, as shipped."""
    found = {}
    for module in modules:
        layer, number = int(module.split(".")[2]), int(module.split(".")[-1])
        with engine.experts.lease(layer, [number]) as lease:
            for group in lease.ready():
                found[module] = ExpertWeights(*(copied(matrix) for matrix in group[number]))
    return found


def copied(matrix: QuantTensor) -> QuantTensor:
    return QuantTensor(matrix.format, matrix.shape, {suffix: part.clone() for suffix, part in matrix.parts.items()})


def requantized(expert: ExpertWeights, formats: tuple[str, str, str]) -> ExpertWeights:
    made = []
    for matrix, name in zip(expert, formats, strict=True):
        stored = format_named(name)
        made.append(QuantTensor(stored, matrix.shape, stored.quantize(matrix.dequantize())))
    return ExpertWeights(*made)


def multiplied(x: torch.Tensor, expert: ExpertWeights, prefill: Prefill | None) -> torch.Tensor:
    backend = CambriconBackend(PlainRuntime(), Operations(emulator.stand_in("1.3.2")), prefill=prefill or "dequantized")
    slot = backend.expert_slot([(matrix.format, matrix.shape) for matrix in expert])
    packed = backend.pack_expert(expert, backend.alloc(slot.nbytes))
    rows = torch.arange(len(x))
    # a step of so many tokens that it is a prompt, or of so few that it is not
    batch = torch.cat((x, x.new_zeros(DECODE_TOKENS, x.shape[1]))) if prefill else x
    out = torch.zeros(len(batch), 1, x.shape[1])
    for part in [rows] if prefill else rows.split(DECODE_TOKENS):
        step = batch if prefill else batch[part]
        there = torch.zeros(len(step), 1, x.shape[1])
        at = part if prefill else torch.arange(len(part))
        backend.expert_ffn(step, [Assignment(packed, at, torch.zeros_like(at))], there).wait()
        out[part] = there[at]
    return out[: len(x), 0]


if __name__ == "__main__":
    main()
