"""The backend on Cambricon's chips, through torch_mlu_ops. Emulated: never run on hardware.

Few tokens: each expert's two products by the weight-only operation. A prompt's step: grouped products, of experts
dequantized to BF16 on arrival, or, with prefill "w4a8", of INT4 codes and activations rounded to INT8 a token, where
the vendor takes the groups. Which of them follows from the step's tokens alone. Shapes as in base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch.nn.functional import silu

from k2lite.quant.formats import PACKED_INT, QuantFormat, Shape
from k2lite.quant.types import ExpertWeights, QuantTensor

from .. import batched
from ..base import (
    DONE,
    Assignment,
    Capabilities,
    Event,
    ExpertSlot,
    RoutingRule,
    Segment,
    UnsupportedOperationError,
)
from ..packing import copy_into_slot, slot_bytes
from ..torch_device.backend import STAGING_PIECES, TorchDeviceBackend
from ..torch_device.expert_link import Copy
from ..torch_device.torch_pinned import PinningRuntime, TorchPinnedPool
from .adapter import GROUP_GEMM_GROUPS, WEIGHT_ONLY_GROUPS, Operations
from .layout import CODES, SCALES, WEIGHT, SignedCodes, signed, values
from .spec import CAPABILITIES, Prefill

# A step of more tokens multiplies its experts in groups.
DECODE_TOKENS = 16
# Experts that are dequantized at once: 88 MB each for K2.
EXPERTS_AT_ONCE = 8


class CambriconBackend(TorchDeviceBackend):
    """`runtime` is the chip, or the processor where a stand-in has the vendor's operations."""

    name: ClassVar[str] = "cambricon"
    contract: ClassVar[int] = 1

    def __init__(self, runtime: PinningRuntime, operations: Operations, *, prefill: Prefill = "dequantized") -> None:
        super().__init__(runtime)
        self._pool = TorchPinnedPool(runtime, STAGING_PIECES)
        self._operations = operations
        self._prefill = prefill

    def capabilities(self) -> Capabilities:
        """The arithmetic names the way of prompts: another way gives other bits."""
        return replace(CAPABILITIES, arithmetic=f"{CAPABILITIES.arithmetic}, prompts {self._prefill}")

    def upload_matrix(self, weight: QuantTensor) -> QuantTensor:
        return super().upload_matrix(signed(weight) if weight.format.name in PACKED_INT else weight)

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        name = weight.format.name
        if name not in CAPABILITIES.formats:
            raise UnsupportedOperationError(
                f"backend cambricon can't multiply {name}; with --allow-fallback plain torch does"
            )
        if not len(x):
            return x.new_empty(0, weight.shape[0])
        if name in PACKED_INT:
            there = weight if isinstance(weight.format, SignedCodes) else self.upload_matrix(weight)
            return self._weight_only(x.to(torch.bfloat16), there).to(torch.float32)
        if name == "bf16":
            return (x.to(torch.bfloat16) @ weight.parts[WEIGHT].T).to(torch.float32)
        return x @ weight.parts[WEIGHT].to(torch.float32).T

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return batched.rms_norm(x, weight, eps)

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return batched.route(x @ weight.dequantize().T, bias, rule)

    def expert_slot(self, expert: Sequence[tuple[QuantFormat, Shape]]) -> ExpertSlot:
        return ExpertSlot(slot_bytes([(_laid_out(stored), shape) for stored, shape in expert]), repacked=True)

    def place_expert(self, src: ExpertWeights, slot: torch.Tensor, copy: Copy) -> ExpertWeights:
        packed = (signed(matrix) if matrix.format.name in PACKED_INT else matrix for matrix in src)
        return copy_into_slot(ExpertWeights(*packed), slot, copy)

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        work = [item for item in work if len(item.rows)]
        if len(x) <= DECODE_TOKENS:
            return super().expert_ffn(x, work, out)
        for at in range(0, len(work), EXPERTS_AT_ONCE):
            part = work[at : at + EXPERTS_AT_ONCE]
            rows = torch.cat([item.rows for item in part])
            slots = torch.cat([item.slots for item in part])
            counts = [len(item.rows) for item in part]
            h = x[rows].to(torch.bfloat16)
            gate, up = (self._grouped(h, [item.expert[side] for item in part], counts) for side in (0, 1))
            y = self._grouped(silu(gate) * up, [item.expert.down_proj for item in part], counts)
            out[rows, slots] = y.to(out.dtype)
        return DONE

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        return batched.latent_attention(q_nope, q_rope, segments, kv_b.dequantize(), scale)

    def _weight_only(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        codes, scales = weight.parts[CODES], weight.parts[SCALES]
        if scales.dim() == 2 and weight.shape[1] // scales.shape[1] not in WEIGHT_ONLY_GROUPS:
            raise UnsupportedOperationError(f"backend cambricon: groups of {weight.shape[1] // scales.shape[1]}")
        return self._operations.weight_only_matmul(x, codes, scales, PACKED_INT[weight.format.name][0])

    def _grouped(self, x: torch.Tensor, weights: Sequence[QuantTensor], counts: Sequence[int]) -> torch.Tensor:
        """x bf16 [M, in], counts[e] rows for weights[e] in turn: bf16 [M, out]."""
        name = weights[0].format.name
        if name not in PACKED_INT:
            return self._operations.group_gemm(x, torch.stack([weight.parts[WEIGHT] for weight in weights]), counts)
        bits, group = PACKED_INT[name]
        codes = torch.stack([weight.parts[CODES] for weight in weights])
        scales = torch.stack([weight.parts[SCALES] for weight in weights])
        if self._prefill == "w4a8" and bits == 4 and group in GROUP_GEMM_GROUPS:
            rounded, x_scale = _rounded(x)
            by_group = scales.permute(2, 0, 1).to(torch.float32).contiguous()
            return self._operations.w4a8_group_gemm(rounded, x_scale, codes, by_group, counts)
        return self._operations.group_gemm(x, values(codes, scales, bits).to(torch.bfloat16), counts)


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as int8 [M, K] with one scale a row, float32 [M]; a row of zeros has scale 1."""
    wide = x.to(torch.float32)
    scale = wide.abs().amax(-1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (wide / scale[:, None]).round().to(torch.int8), scale


def _laid_out(stored: QuantFormat) -> QuantFormat:
    return SignedCodes(stored.name) if stored.name in PACKED_INT else stored
