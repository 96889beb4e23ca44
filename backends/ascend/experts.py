"""The experts of a call: rows sorted by expert, one grouped product for gate and up, one for down, rows put back.

Experts of one arena are one 3-D weight over all its slots, others a list of 2-D weights; both as large at most as the
operation takes. Shapes: T tokens, D hidden, F expert width, K active experts, M rows of a call, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from k2lite.quant.formats import PACKED_INT

from ..base import Assignment
from .layout import Arena, ExpertKind, PackedAlongOutputs, PlacedPlain
from .operations import MAX_WEIGHTS, grouped_matmul, sort_by_expert, swiglu, unsort


@dataclass(frozen=True)
class Call:
    """What one call multiplies: `numbers[i]` is the weight that work[i] wants, of `weights` in all. gate_up and down
    are lists of codes and scales or of plain weights: of one 3-D tensor, or of 2-D ones."""

    work: Sequence[Assignment]
    numbers: Sequence[int]
    weights: int
    kind: ExpertKind
    gate_up: list[list[torch.Tensor]]
    down: list[list[torch.Tensor]]


class GroupedExperts:
    """Keeps zeros for the largest arena: the operation wants offsets, and these formats have none."""

    def __init__(self, device: torch.device) -> None:
        self._zeros = torch.zeros(0, dtype=torch.bfloat16, device=device)

    def reserve(self, count: int) -> None:
        """Have so many zeros before anything multiplies."""
        if count > self._zeros.numel():
            self._zeros = torch.zeros(count, dtype=torch.bfloat16, device=self._zeros.device)

    def multiply(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> None:
        """As Backend.expert_ffn; x is float32 [T, D]."""
        for call in calls([item for item in work if len(item.rows)]):
            rows = torch.cat([item.rows for item in call.work])
            slots = torch.cat([item.slots for item in call.work])
            sizes = torch.tensor([len(item.rows) for item in call.work])
            owners = torch.tensor(call.numbers, dtype=torch.int32).repeat_interleave(sizes).to(x.device)
            h, places, counts = sort_by_expert(x[rows].to(torch.bfloat16), owners, call.weights)
            h = swiglu(self._product(h, call.kind.gate_up, call.gate_up, counts))
            y = unsort(self._product(h, call.kind.down, call.down, counts), places)
            out[rows, slots] = y.to(out.dtype)

    def _product(
        self, x: torch.Tensor, name: str, stacks: list[list[torch.Tensor]], counts: torch.Tensor
    ) -> torch.Tensor:
        if name not in PACKED_INT:
            return grouped_matmul(x, [weight.transpose(-1, -2) for weight in stacks[0]], [], [], counts)
        codes, stored = stacks
        scales = [scale.squeeze(-2) if scale.shape[-2] == 1 else scale for scale in stored]
        return grouped_matmul(x, codes, scales, [self._zero(scale) for scale in scales], counts)

    def _zero(self, scale: torch.Tensor) -> torch.Tensor:
        self.reserve(scale.numel())
        return self._zeros[: scale.numel()].view(scale.shape)


def calls(work: Sequence[Assignment]) -> Iterator[Call]:
    """Work with the experts of one arena together; of what lies by itself, as many as a list may hold."""
    shared: dict[int, list[Assignment]] = {}
    alone: dict[ExpertKind, list[Assignment]] = {}
    for item in work:
        arena, _ = place(item)
        if arena.slots > 1:
            shared.setdefault(id(arena), []).append(item)
        else:
            alone.setdefault(arena.kind, []).append(item)
    for items in shared.values():
        arena = place(items[0])[0]
        numbers = [place(item)[1] for item in items]
        stacks = ([[tensor] for tensor in tensors] for tensors in (arena.gate_up, arena.down))
        yield Call(items, numbers, arena.slots, arena.kind, *stacks)
    for kind, items in alone.items():
        for at in range(0, len(items), MAX_WEIGHTS):
            part = items[at : at + MAX_WEIGHTS]
            arenas = [place(item)[0] for item in part]
            lists = (
                [[tensor[0] for tensor in plane] for plane in zip(*planes, strict=True)]
                for planes in ([arena.gate_up for arena in arenas], [arena.down for arena in arenas])
            )
            yield Call(part, range(len(part)), len(part), kind, *lists)


def place(item: Assignment) -> tuple[Arena, int]:
    """The arena and the slot that pack_expert put an expert into."""
    stored = item.expert.gate_proj.format
    if isinstance(stored, PackedAlongOutputs | PlacedPlain) and stored.arena is not None:
        return stored.arena, stored.slot
    raise ValueError("an expert that was not packed by this backend")
