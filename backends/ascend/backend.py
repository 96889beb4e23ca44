"""The backend on Huawei's Ascend chips, through torch.ops.npu. Emulated: never run on hardware.

Experts and integer matrices are laid out anew on the host on their way to the chip. The router, norms, rotation and the
sum over experts are plain torch in float32. Shapes as in base.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

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
from ..torch_device.backend import STAGING_PIECES, TorchDeviceBackend
from ..torch_device.expert_link import Copy
from ..torch_device.torch_pinned import PinningRuntime, TorchPinnedPool
from .attention import attention, causal_mask
from .experts import GroupedExperts
from .layout import (
    ALIGNMENT,
    CODES,
    SCALES,
    WEIGHT,
    Arena,
    ExpertKind,
    PackedAlongOutputs,
    PlacedPlain,
    add_matrix,
    packed_matrix,
)
from .operations import MAX_GROUPS, MAX_SIDE, dense_matmul
from .packing import Packing
from .spec import CAPABILITIES


class AscendBackend(TorchDeviceBackend):
    """`runtime` is the chip, or the processor where an emulator stands in for the vendor's operations."""

    name: ClassVar[str] = "ascend"
    contract: ClassVar[int] = 1

    def __init__(self, runtime: PinningRuntime) -> None:
        super().__init__(runtime)
        self._pool = TorchPinnedPool(runtime, STAGING_PIECES)
        self._experts = GroupedExperts(runtime.device)
        self._slots = WeakTensorKeyDictionary()
        self._staging: dict[ExpertKind, Arena] = {}
        self._mask: torch.Tensor | None = None

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def upload_matrix(self, weight: QuantTensor) -> QuantTensor:
        if weight.format.name not in PACKED_INT:
            return super().upload_matrix(weight)
        return super().upload_matrix(packed_matrix(weight))

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        rows = weight.shape[0]
        if weight.format.name not in CAPABILITIES.formats:
            raise UnsupportedOperationError(
                f"backend ascend can't multiply {weight.format.name}; with --allow-fallback plain torch does"
            )
        if not len(x):
            return x.new_empty(0, rows)
        if weight.format.name == "bf16":
            return (x.to(torch.bfloat16) @ weight.parts[WEIGHT].T).to(torch.float32)
        if weight.format.name not in PACKED_INT:
            return x @ weight.parts[WEIGHT].to(torch.float32).T
        packed = weight if isinstance(weight.format, PackedAlongOutputs) else self.upload_matrix(weight)
        return self._dense(x.to(torch.bfloat16), packed)[:, :rows].to(torch.float32)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return batched.rms_norm(x, weight, eps)

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return batched.route(x @ weight.dequantize().T, bias, rule)

    def expert_slot(self, expert: Sequence[tuple[QuantFormat, Shape]]) -> ExpertSlot:
        kind = ExpertKind.of(expert)
        return ExpertSlot(kind.nbytes, max_slots=MAX_GROUPS, repacked=True, beside_bytes=2 * kind.offsets)

    def alloc_slots(self, expert: Sequence[tuple[QuantFormat, Shape]], count: int) -> list[torch.Tensor]:
        """In arenas of at most 1,024 slots, one 3-D tensor for each plane. A slot is named by its first plane."""
        kind = ExpertKind.of(expert)
        self._experts.reserve(min(count, MAX_GROUPS) * kind.offsets)
        names = []
        for first in range(0, count, MAX_GROUPS):
            slots = min(MAX_GROUPS, count - first)
            arena = Arena(kind, self.alloc(slots * kind.nbytes), slots)
            for number in range(slots):
                names.append(arena.slot(number)[0])
                self._slots[names[-1]] = (arena, number)
        return names

    def place_expert(self, src: ExpertWeights, slot: torch.Tensor, copy: Copy) -> ExpertWeights:
        """`copy` is done with what it reads when it returns: the pages here are not pinned."""
        kind = ExpertKind.of([(matrix.format, matrix.shape) for matrix in src])
        arena, number = self._slots[slot] if slot in self._slots else (Arena(kind, slot, 1), 0)
        if arena.kind != kind:
            raise ValueError(f"a slot for {arena.kind} and an expert of {kind}")
        placed = src.gate_proj.format
        if isinstance(placed, PackedAlongOutputs | PlacedPlain) and placed.arena is not None:
            planes = placed.arena.slot(placed.slot)  # of a packed copy
        else:
            planes = self.staged(src, kind).slot(0)
        for here, there in zip(planes, arena.slot(number), strict=True):
            copy(here, there).wait()
        return arena.weights(number)

    def packed_views(self, expert: Sequence[tuple[QuantFormat, Shape]], memory: torch.Tensor) -> ExpertWeights:
        return Arena(ExpertKind.of(expert), memory, 1).weights(0)

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        self._experts.multiply(x, work, out)
        return DONE

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        if self._mask is None:
            self._mask = causal_mask(self.device)
        values = kv_b.parts[WEIGHT] if kv_b.format.name == "bf16" else kv_b.dequantize().to(torch.bfloat16)
        return attention(q_nope, q_rope, segments, values, self._mask, scale)

    def _dense(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        stored, columns = weight.format, weight.shape[1]
        assert isinstance(stored, PackedAlongOutputs)
        codes, scales = weight.parts[CODES], weight.parts[SCALES]
        if max(columns, scales.shape[1]) > MAX_SIDE:
            raise UnsupportedOperationError(
                f"backend ascend: a matrix {list(weight.shape)} in {stored.name}; sides are {MAX_SIDE} at most in "
                "integers, and BF16 has no limit"
            )
        group = stored.group_size(columns)
        return dense_matmul(x, codes, scales if group else scales[0], group)

    def staged(self, src: ExpertWeights, kind: ExpertKind) -> Arena:
        """An expert of this kind laid out for the chip, in memory of the host that the next one will overwrite."""
        if kind not in self._staging:
            # numpy asks for huge pages, and a transposition touches many at once
            room = torch.from_numpy(np.empty(kind.nbytes + ALIGNMENT, np.uint8))
            self._staging[kind] = Arena(kind, room[-room.data_ptr() % ALIGNMENT :][: kind.nbytes], 1)
        staged, packing = self._staging[kind], Packing()
        for name, tensors, matrices in (
            (kind.gate_up, staged.gate_up, (src.gate_proj, src.up_proj)),
            (kind.down, staged.down, (src.down_proj,)),
        ):
            first = 0
            for matrix in matrices:
                rows = matrix.shape[0]
                if name in PACKED_INT:
                    add_matrix(packing, matrix, tensors[0][0].view(torch.uint8), tensors[1][0], first)
                else:
                    tensors[0][0][first : first + rows] = matrix.parts[WEIGHT]
                first += rows
        packing.run()
        return staged
