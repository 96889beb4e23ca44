"""The suite's cases of cache and lease, on a device that works later: events that lie, slots that are not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from k2lite.backends.base import DONE, Assignment, Event
from k2lite.backends.reference import ReferenceBackend
from k2lite.quant.types import ExpertWeights
from tests.backends.test_conformance import Wrong, cases_of, failures


class Deferred(ReferenceBackend):
    """A device with a queue: kernels and copies run in order, when an event is waited for or the next one is given."""

    kernels_lie = copies_lie = False

    def __init__(self) -> None:
        super().__init__()
        self._queue: list[Callable[[], object]] = []

    def run_queue(self) -> None:
        while self._queue:
            self._queue.pop(0)()

    def _later(self, work: Callable[[], object], *, lies: bool) -> Event:
        self._queue.append(work)
        return DONE if lies else type("Later", (), {"wait": lambda _: self.run_queue()})()

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        self.run_queue()
        return self._later(lambda: ReferenceBackend.expert_ffn(self, x, work, out), lies=self.kernels_lie)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        if self.kernels_lie:  # a queue of its own for copies
            dst.copy_(src)
            self.run_queue()
            return DONE
        return self._later(lambda: dst.copy_(src), lies=self.copies_lie)


def packs_too_much(self: ReferenceBackend, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
    """Clears as far as its own tiles reach, which is beyond the slot."""
    begin = slot.storage_offset() + slot.nbytes
    whole = torch.empty(0, dtype=torch.uint8).set_(slot.untyped_storage())
    whole[begin : begin + 128] = 0
    return ReferenceBackend.pack_expert(self, src, slot)


def test_a_device_with_a_queue_passes_the_cache_s_cases() -> None:
    assert failures(Deferred(), "cache") == []


@pytest.mark.parametrize(
    ("backend", "seen_by"),
    [
        (type("KernelsLie", (Deferred,), {"kernels_lie": True}), "a slot is filled anew after its event"),
        (type("CopiesLie", (Deferred,), {"copies_lie": True}), "a source is overwritten once it is packed"),
        (type("CopiesLie", (Deferred,), {"copies_lie": True}), "a source is overwritten after its copy's event"),
        (type("PacksTooMuch", (Wrong,), {"pack_expert": packs_too_much}), "slots side by side"),
    ],
)
def test_an_event_that_lies_and_a_slot_that_is_not_kept_are_seen(backend: type[ReferenceBackend], seen_by: str) -> None:
    (case,) = [case for case in cases_of("cache") if case.name == seen_by]
    said = case.result(backend()).said
    assert "has another result" in said or "a copy holds what its source became" in said
