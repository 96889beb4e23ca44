"""The base class and its parts on the stand-in: the conformance suite, slots, pinned memory, errors."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.backends.base import Backend
from k2lite.backends.torch_device.pinned import PinnedPages, PinnedPool, host_pages
from k2lite.backends.torch_device.slots import DeviceSlots
from k2lite.device_rates import measure_device
from k2lite.quant.errors import BackendError
from k2lite.quant.types import ExpertWeights
from k2lite.testing.samples import expert
from k2lite.testing.suite import conformance_cases
from tests.samples import examples
from tests.stand_in.clocks import MisuseError
from tests.stand_in.engines import StandInBackend

FORMATS = ("int4_g32", "int8_channel", "bf16")
PAGE = 4096


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_conformance_suite_passes(soak: bool) -> None:
    """Of its many cases an eighth, drawn; the models among them are tested as engines."""
    backend = StandInBackend(5)
    cases = [case for case in conformance_cases() if case.operation != "model"]
    with torch.inference_mode():
        for case in cases if soak else random.Random(0).sample(cases, len(cases) // 8):
            result = case.result(backend)
            assert result.passed, f"{case}: {result.said}"


def on_host(backend: Backend, weights: ExpertWeights) -> list[bytes]:
    parts = [part for matrix in weights for part in matrix.parts.values()]
    return [backend.download(part).contiguous().view(torch.uint8).numpy().tobytes() for part in parts]


@given(seed=st.integers(0, 9999), count=st.integers(1, 4), most=st.sampled_from((None, 1, 3)), locked=st.booleans())
@settings(max_examples=examples(10), deadline=None)
def test_experts_arrive_whole_whatever_the_order_of_copies(
    seed: int, count: int, most: int | None, locked: bool
) -> None:
    """Experts go into slots that kernels still read, and some come back; the stand-in sees who forgets an event."""
    backend, drawn = StandInBackend(seed), random.Random(seed)
    sources = [expert(30 + 3 * n, (name, name, name), 64, 64) for n, name in enumerate(FORMATS)]
    nbytes = max(backend.expert_slot([(m.format, m.shape) for m in source]).nbytes for source in sources)
    slots, link = DeviceSlots.of_bytes(backend.runtime, count, nbytes, most), backend.expert_link()
    expected = [on_host(backend, source) for source in sources]
    if locked:  # as they lie in an arena
        pages = host_pages(-(-nbytes // PAGE) * PAGE)
        backend.runtime.pin(pages)
    for _ in range(12):
        slot, number = drawn.randrange(count), drawn.randrange(len(sources))
        source = backend_copy(sources[number], pages) if locked else sources[number]
        sent = link.send(source, slots, slot, locked=pages if locked else None)
        link.use(sent.event)
        assert on_host(backend, sent.weights) == expected[number]
        slots.read_until(slot, link.computed())
        sent.event.synchronize()  # the host's pages are free
        if locked and drawn.random() < 0.3:
            pages.zero_()
            link.fetch(slots, slot, pages[:nbytes]).synchronize()
            assert bytes(pages[: len(expected[number][0])].numpy()) == expected[number][0]


def backend_copy(source: ExpertWeights, pages: torch.Tensor) -> ExpertWeights:
    from k2lite.backends.packing import copy_into_slot
    from k2lite.backends.reference import ReferenceBackend

    return copy_into_slot(source, pages, ReferenceBackend().copy)


def test_a_slot_that_is_written_without_its_claim_is_seen() -> None:
    backend = StandInBackend(1)
    source = expert(30, ("bf16", "bf16", "bf16"), 64, 64)
    slots, link = DeviceSlots.of_bytes(backend.runtime, 1, 30_000), backend.expert_link()
    sent = link.send(source, slots, 0, locked=None)
    link.use(sent.event)
    sent.weights.gate_proj.parts["weight"].clone()  # a kernel that nobody has waited for
    slots.claim = lambda slot, _stream: slots.memory(slot)  # type: ignore[method-assign]
    with pytest.raises(MisuseError, match="no event says which comes first"):
        link.send(source, slots, 0, locked=None)


def test_pinned_memory_is_exactly_as_large_as_asked() -> None:
    backend = StandInBackend()
    pool = PinnedPool(backend.runtime, pieces=3, piece_bytes=5 * PAGE)
    source = torch.arange(40_000, dtype=torch.int32)
    there = backend.alloc(source.nbytes).view(torch.int32)
    pool.send(source, there, backend.runtime.compute_stream())
    assert torch.equal(backend.download(there), source)
    assert list(backend.runtime.pinned.values()) == [15 * PAGE]
    pool.close()
    assert not backend.runtime.pinned
    pages = PinnedPages(backend.runtime, pytest.fail)
    memory = host_pages(7 * PAGE)
    assert pages.hold(memory[PAGE : 3 * PAGE])
    assert pages.hold(memory[PAGE : 3 * PAGE])
    assert list(backend.runtime.pinned.values()) == [2 * PAGE]
    pages.release(memory[:PAGE])
    pages.close()
    assert not backend.runtime.pinned


def test_errors_that_are_not_the_devices_pass_as_they_are() -> None:
    backend = StandInBackend()
    with pytest.raises(ZeroDivisionError), backend.telling():
        _ = 1 // 0
    with pytest.raises(BackendError, match="of 1024 MiB free") as told, backend.telling():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert isinstance(told.value.__cause__, torch.OutOfMemoryError)


def test_the_devices_rates_are_measured_and_leave_nothing_locked() -> None:
    backend = StandInBackend()
    found = measure_device(backend, 1 << 20)
    assert min(found.memory, found.link, found.flops) > 0
    assert not [nbytes for nbytes in backend.runtime.pinned.values() if nbytes == 1 << 20]
