"""cache: slots that are given away as soon as an event says that their kernels are over, and the real cache on top.

What a cache does to a backend: packs an expert while others multiply, waits for an event, and at once lets other bytes
come into the slot, or into the host memory that it was packed from. Nothing here may change a bit. A backend that
finishes everything before it returns passes trivially; one whose events come too early does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from k2lite.backends.base import Assignment, Backend, Capabilities, Event
from k2lite.loading import load
from k2lite.model_folder import open_model
from k2lite.offload.cache import ExpertCache
from k2lite.offload.packed_source import PackedSource, packing_bytes
from k2lite.offload.policies import make_policy
from k2lite.offload.slots import Arena, slot_bytes_for
from k2lite.offload.source import ExpertSource
from k2lite.offload.store import ExpertStore
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.types import ExpertKey, ExpertWeights, QuantTensor

from . import oracle
from .case import Case, Measured, demand
from .model_cases import PROMPT, SIZES, chosen_formats, has_formats, random_folder
from .samples import expert, normal, packed

HIDDEN = WIDTH = 128
ROWS = 24
EXPERTS = 4
# Calls that are under way, where a device works by itself, when something is done to a slot.
AHEAD = 4
MLP_GROWTH = 4.0
ALIGNMENT = 64


def cases() -> Iterator[Case]:
    for name, check in (
        ("a slot is filled anew after its event", _slot_filled_anew),
        ("a source is overwritten once it is packed", _source_overwritten),
        ("a source is overwritten after its copy's event", _copied_source_overwritten),
        ("two in flight, one slot given away", _two_in_flight),
        ("slots side by side", _side_by_side),
    ):
        yield Case("cache", name, check, _has_experts)
    yield Case("cache", "leases of more experts than slots", _leases, has_formats)
    yield Case("cache", "the fewest slots give the same bits", _fewest_slots, has_formats)


def _has_experts(can: Capabilities) -> bool:
    return chosen_formats(can) is not None


class _Workbench:
    """A few experts, rows to multiply them with, and what comes out while nothing else is under way."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        formats = chosen_formats(backend.capabilities())
        if formats is None:
            raise ValueError("the table has no formats for experts")
        names = (formats[0],) * 3
        self.sources = [expert(60 + 3 * number, names, HIDDEN, WIDTH) for number in range(EXPERTS)]
        self.room = backend.expert_slot([(matrix.format, matrix.shape) for matrix in self.sources[0]])
        self.x = backend.upload(normal(70, ROWS, HIDDEN))
        self.rows = backend.upload(torch.arange(ROWS))
        self.places = backend.upload(torch.zeros(ROWS, dtype=torch.int64))
        self.expected = [self._alone(source) for source in self.sources]
        self._others = packed(backend, self.sources[0])

    def _alone(self, source: ExpertWeights) -> torch.Tensor:
        out = self.out()
        self.start(packed(self.backend, source), out).wait()
        return out.cpu()

    def out(self) -> torch.Tensor:
        """Room for results, [ROWS, 1, HIDDEN]."""
        return self.backend.upload(torch.zeros(ROWS, 1, HIDDEN))

    def start(self, weights: ExpertWeights, out: torch.Tensor) -> Event:
        return self.backend.expert_ffn(self.x, [Assignment(weights, self.rows, self.places)], out)

    def keep_busy(self) -> list[Event]:
        """Begin work that what follows has to queue behind."""
        return [self.start(self._others, self.out()) for _ in range(AHEAD)]

    def spoil(self, slot: torch.Tensor) -> None:
        """What the cache does to a slot that it gives away: other bytes come."""
        self.backend.copy(torch.full((slot.nbytes,), 0x3C, dtype=torch.uint8), slot).wait()

    def demand_result(self, number: int, out: torch.Tensor, after: str) -> None:
        demand(torch.equal(out.cpu(), self.expected[number]), f"expert {number} has another result {after}")


def _slot_filled_anew(backend: Backend) -> None:
    bench = _Workbench(backend)
    slot = backend.alloc(bench.room.nbytes)
    for number in (0, 1, 2, 3, 0):
        ahead, out = bench.keep_busy(), bench.out()
        bench.start(backend.pack_expert(bench.sources[number], slot), out).wait()
        bench.spoil(slot)
        bench.demand_result(number, out, "where its slot was filled anew after its event")
        for event in ahead:
            event.wait()


def _source_overwritten(backend: Backend) -> None:
    """The host's slot of a packed expert may be read into at once."""
    bench = _Workbench(backend)
    slot = backend.alloc(bench.room.nbytes)
    for number in range(EXPERTS):
        ahead, out = bench.keep_busy(), bench.out()
        here = _copy_of(bench.sources[number])
        there = backend.pack_expert(here, slot)
        for matrix in here:
            for part in matrix.parts.values():
                part.view(torch.uint8).fill_(0x3C)
        bench.start(there, out).wait()
        bench.demand_result(number, out, "where what it was packed from was overwritten")
        for event in ahead:
            event.wait()


def _copy_of(source: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(
        *(
            QuantTensor(matrix.format, matrix.shape, {name: part.clone() for name, part in matrix.parts.items()})
            for matrix in source
        )
    )


def _copied_source_overwritten(backend: Backend) -> None:
    bench = _Workbench(backend)
    source = normal(71, 4096)
    there, expected = backend.alloc(source.nbytes).view(torch.float32), source.clone()
    ahead = bench.keep_busy()
    backend.copy(source, there).wait()
    source.zero_()
    here = torch.zeros_like(source)
    backend.copy(there, here).wait()
    demand(torch.equal(here, expected), "a copy holds what its source became after the event")
    for event in ahead:
        event.wait()


def _two_in_flight(backend: Backend) -> None:
    """Only one of two events is waited for, and only its slot is given away."""
    bench = _Workbench(backend)
    slots = [backend.alloc(bench.room.nbytes) for _ in range(2)]
    outs = [bench.out() for _ in range(3)]
    ahead = bench.keep_busy()
    first, second = (
        bench.start(backend.pack_expert(bench.sources[number], slots[number]), outs[number]) for number in range(2)
    )
    first.wait()
    third = bench.start(backend.pack_expert(bench.sources[2], slots[0]), outs[2])
    second.wait()
    bench.spoil(slots[1])
    third.wait()
    bench.spoil(slots[0])
    for number, out in enumerate(outs):
        bench.demand_result(number, out, "beside others in flight")
    for event in ahead:
        event.wait()


def _side_by_side(backend: Backend) -> None:
    """An expert's slot is its own: what lies before and behind it stays."""
    bench = _Workbench(backend)
    stride = -(-bench.room.nbytes // ALIGNMENT) * ALIGNMENT
    count = min(3, bench.room.max_slots or 3)
    arena = backend.alloc(count * stride)
    slots = [arena[at * stride : at * stride + bench.room.nbytes] for at in range(count)]
    there = {at: backend.pack_expert(bench.sources[at], slots[at]) for at in reversed(range(count))}
    for at in range(count):
        out = bench.out()
        bench.start(there[at], out).wait()
        bench.demand_result(at, out, "in an arena beside others")
    middle = count // 2
    there[middle] = backend.pack_expert(bench.sources[EXPERTS - 1], slots[middle])
    for at in range(count):
        out = bench.out()
        bench.start(there[at], out).wait()
        number = EXPERTS - 1 if at == middle else at
        bench.demand_result(number, out, "after its neighbour was filled anew")


def _leases(backend: Backend) -> Measured:
    """Every expert of a small model, twice, through a cache that has room for a few: each group's slots are filled
    anew as soon as its events are over. Against float64."""
    with random_folder(backend) as folder:
        config, checkpoint = open_model(folder)
        slots = config.num_experts_per_tok + 1
        cache = ExpertCache(
            ExpertStore(checkpoint, threads=2),
            Arena(slots, slot_bytes_for(checkpoint)),
            config.moe_layers,
            config.n_routed_experts,
            policy=make_policy("lru", config.moe_layers, config.n_routed_experts, slots - 1),
            ring=1,
        )
        try:
            source: ExpertSource = PackedSource(cache, backend) if packing_bytes(checkpoint, backend) else cache
            error = max(_lease_error(backend, source, checkpoint, layer) for layer in config.moe_layers * 2)
        finally:
            cache.close()
    return Measured(error, MLP_GROWTH * backend.capabilities().numerics.linear_error)


def _lease_error(backend: Backend, source: ExpertSource, checkpoint: Checkpoint, layer: int) -> float:
    hidden = SIZES["hidden_size"]
    x = normal(72 + layer, 6, hidden)
    there, rows, places = backend.upload(x), backend.upload(torch.arange(6)), backend.upload(torch.zeros(6).long())
    results: dict[int, torch.Tensor] = {}
    with source.lease(layer, range(SIZES["n_routed_experts"]), [0, 5]) as lease:
        for group in lease.ready():
            outs = {number: backend.upload(torch.zeros(6, 1, hidden)) for number in group}
            events = [
                backend.expert_ffn(there, [Assignment(weights, rows, places)], outs[number])
                for number, weights in group.items()
            ]
            for event in events:
                event.wait()
            results |= outs
    demand(sorted(results) == list(range(SIZES["n_routed_experts"])), f"only experts {sorted(results)} came")
    error = 0.0
    for number, out in results.items():
        layout = checkpoint.expert(ExpertKey(layer, number))
        expected = oracle.mlp(oracle.exact(x), expert_weights(layout, read_extents(layout)))
        error = max(error, oracle.relative_error(out[:, 0], expected))
    return error


def _fewest_slots(backend: Backend) -> None:
    with random_folder(backend) as folder:
        whole = load(folder, backend=backend, context=128)
        least = load(folder, backend=backend, context=128, resident_experts=SIZES["num_experts_per_tok"] + 1)
        with whole, least:
            expected = whole.logits(PROMPT)
            for when in ("at first", "the second time"):
                found = least.logits(PROMPT)
                demand(torch.equal(found, expected), f"other bits than with room for all experts, {when}")
