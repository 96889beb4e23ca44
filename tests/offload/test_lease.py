"""Each sentence of the lease contract in offload/cache.py."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from k2lite.errors import CheckpointError, MemoryPlanError
from k2lite.offload.cache import ExpertCache
from k2lite.offload.lease import WAVE_EXPERTS
from k2lite.offload.policies import DEFAULT_POLICY
from k2lite.offload.source import Lease
from k2lite.offload.statistics import RouterStats
from k2lite.quant.types import ExpertWeights
from tests.offload.caches import FaultyFiles, Gate, io_error, open_cache
from tests.samples import examples

Stored = dict[str, torch.Tensor]
SLOTS = 16


@pytest.fixture
def cache(tiny_folder: Path) -> ExpertCache:
    """Room for everything."""
    return open_cache(tiny_folder, SLOTS, ring=0)


def demand_right(layer: int, group: Mapping[int, ExpertWeights], stored: Stored) -> None:
    for number, weights in group.items():
        for projection, tensor in weights._asdict().items():
            for suffix, part in tensor.parts.items():
                name = f"model.layers.{layer}.mlp.experts.{number}.{projection}.{suffix}"
                assert torch.equal(part, stored[name]), name


def take_all(lease: Lease) -> dict[int, ExpertWeights]:
    return {number: weights for group in lease.ready() for number, weights in group.items()}


def observe(cache: ExpertCache, layer: int, experts: list[int]) -> None:
    cache.observe(layer, torch.tensor([experts]), torch.ones(1, len(experts)))


def settled(cache: ExpertCache) -> ExpertCache:
    """Nothing is leased or under way: every slot has one owner."""
    while cache.is_reading:
        cache.collect(wait=True)
    owned = [held.slot for held in cache._table.values()]
    assert sorted([*owned, *cache._free, *cache._ring]) == list(range(cache.arena.slots))
    assert cache._pinned_residents == 0
    assert all(held.pins == 0 for held in cache._table.values())
    return cache


def test_released_exactly_once(cache: ExpertCache) -> None:
    with cache.lease(1, [0]) as lease:
        take_all(lease)
    with pytest.raises(RuntimeError, match="released twice"):
        lease.release()
    settled(cache)


def test_released_when_its_block_fails_and_of_no_use_afterwards(cache: ExpertCache) -> None:
    with pytest.raises(ZeroDivisionError), cache.lease(1, [0]) as lease:
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="after its release"):
        next(iter(lease.ready()))
    with pytest.raises(RuntimeError, match="released twice"):
        lease.release()
    settled(cache)


def test_views_stay_valid_until_the_release(tiny_folder: Path, stored: Stored) -> None:
    """Whatever is leased meanwhile, with two slots to spare: the bytes are those of the files at the end too."""
    cache = open_cache(tiny_folder, 4, ring=1)
    with cache.lease(1, [3, 6]) as lease:
        held = take_all(lease)
        for layer in (1, 2):
            with cache.lease(layer, list(range(8))) as other:
                for group in other.ready():
                    demand_right(layer, group, stored)
        demand_right(1, held, stored)
    settled(cache)


def test_every_expert_comes_once_and_resident_ones_first(cache: ExpertCache) -> None:
    with cache.lease(1, [5, 2]) as lease:
        assert sorted(take_all(lease)) == [2, 5]
    with cache.lease(1, [0, 2, 3, 5]) as lease:
        groups = [sorted(group) for group in lease.ready()]
    assert groups[0] == [2, 5]
    assert sorted(number for group in groups for number in group) == [0, 2, 3, 5]


def test_the_rest_comes_in_the_order_of_arrival(tiny_folder: Path) -> None:
    first = {1: 0}

    def delay_expert_1(_path: Path, offset: int) -> None:
        if first.setdefault(offset, len(first)) == 1:
            time.sleep(0.2)

    cache = open_cache(tiny_folder, SLOTS, ring=0, files=FaultyFiles(delay_expert_1))
    with cache.lease(1, [1, 6]) as lease:
        assert [sorted(group) for group in lease.ready()] == [[6], [1]]


def test_misses_are_submitted_when_the_lease_is_made(tiny_folder: Path) -> None:
    files = FaultyFiles()
    cache = open_cache(tiny_folder, SLOTS, ring=0, files=files)
    with cache.lease(1, [0, 1, 2]) as lease:
        while cache.counters.read_experts < 3:
            cache.collect(wait=True)  # nobody asked for a group yet
        assert [sorted(group) for group in lease.ready()] == [[0, 1, 2]]


def test_each_expert_asked_for_is_counted_once_and_read_once(cache: ExpertCache) -> None:
    for _ in range(3):
        with cache.lease(2, [1, 4]) as lease:
            take_all(lease)
    counters = cache.counters
    assert (counters.requested_experts, counters.hit_experts, counters.read_experts) == (6, 4, 2)
    with cache.lease(2, [1]) as lease:
        found = take_all(lease)
    assert cache.counters.requested_experts == 7
    assert cache.counters.read_bytes == 2 * sum(tensor.nbytes for tensor in found[1])
    assert cache.counters.read_s > 0
    assert cache.counters.wait_s > 0


def test_asking_twice_for_one_expert_is_an_error(cache: ExpertCache) -> None:
    with pytest.raises(ValueError, match="asked for twice"):
        cache.lease(1, [3, 3])


@pytest.mark.parametrize("slots", [4, 5, 9])
@pytest.mark.parametrize("keep", [None, [0, 3]])
def test_more_experts_than_slots_come_in_waves(
    tiny_folder: Path, stored: Stored, slots: int, keep: list[int] | None
) -> None:
    cache = open_cache(tiny_folder, slots, ring=1)
    for layer in (1, 2, 1):
        observe(cache, layer, list(range(8)))
        with cache.lease(layer, list(range(8)), keep) as lease:
            seen = []
            for group in lease.ready():
                demand_right(layer, group, stored)
                seen += sorted(group)
        assert sorted(seen) == list(range(8))
        settled(cache)


def test_in_waves_a_few_come_at_a_time_and_what_arrived_before_what_is_resident(tiny_folder: Path) -> None:
    """Else the drive would wait until all that is resident was multiplied."""
    cache = open_cache(tiny_folder, 7, ring=2)
    with cache.lease(1, [0, 1, 2, 3, 4]) as lease:
        take_all(lease)
    observe(cache, 1, list(range(8)))
    with cache.lease(1, list(range(8)), keep=[0]) as lease:
        groups = []
        for group in lease.ready():
            groups.append(list(group))
            while any(held.read is not None for held in cache._table.values()):
                cache.collect(wait=True)
    assert [len(group) for group in groups] == [WAVE_EXPERTS] * 4
    assert groups[0] == [0, 1]
    assert set(groups[1]) <= {5, 6}, "read while the first two were in use"
    settled(cache)


def test_a_prompt_leaves_the_decode_set_alone(tiny_folder: Path) -> None:
    """Of a lease with `keep`, only what is kept may displace anything."""
    cache = open_cache(tiny_folder, 6, ring=2)
    observe(cache, 1, [0, 1, 2, 3])
    with cache.lease(1, [0, 1, 2, 3]) as lease:
        take_all(lease)
    with cache.lease(2, list(range(8)), []) as lease:
        take_all(lease)
    assert {held.key for held in cache._table.values()} == {(1, expert) for expert in range(4)}
    observe(cache, 2, [7])
    with cache.lease(2, list(range(8)), [7]) as lease:
        take_all(lease)
    assert (2, 7) in cache._table
    assert len(settled(cache)._table) == 4


def test_between_two_layers_of_a_prompt_the_drive_goes_on(tiny_folder: Path, stored: Stored) -> None:
    issued = 0
    for _ in range(20):  # a ring that is full to the last moment has no slot for it
        cache = open_cache(tiny_folder, 7, ring=3, prefetch_width=1)
        with cache.lease(1, list(range(8)), []) as lease:
            take_all(lease)
        while cache.is_reading:
            cache.collect(wait=True)
        issued = cache.counters.prefetch.issued
        if issued:
            break
    assert 1 <= issued <= 3
    with cache.lease(2, list(range(8)), []) as lease:
        seen = []
        for group in lease.ready():
            demand_right(2, group, stored)
            seen += list(group)
    assert sorted(seen) == list(range(8))
    assert (cache.counters.prefetch.useful, cache.counters.prefetch.issued) == (issued, issued)  # no layer follows
    with cache.lease(1, [0, 1], []) as lease:  # too few to expect the same of the next
        take_all(lease)
    assert cache.counters.prefetch.issued == issued
    assert cache.counters.read_experts < 19
    settled(cache)


def test_a_prompt_that_begins_reads_into_places_that_nobody_has(tiny_folder: Path, stored: Stored) -> None:
    cache = open_cache(tiny_folder, 6, ring=1, prefetch_width=1)
    cache.prompt_begins(1, 3)  # as little as that says nothing of any expert
    assert not cache.is_reading
    with cache.lease(2, [7]) as lease:
        take_all(lease)
    cache.prompt_begins(6, 3)
    while cache.is_reading:
        cache.collect(wait=True)
    assert (cache.counters.read_experts, cache.counters.prefetch.issued, cache.resident_experts) == (6, 5, 5)
    with cache.lease(2, [7]) as lease:  # nobody lost a place
        demand_right(2, take_all(lease), stored)
    assert cache.counters.hit_experts == 1
    with cache.lease(1, [1, 2, 6], keep=[1, 2]) as lease:
        for group in lease.ready():
            demand_right(1, group, stored)
    # what was read ahead is read once and is no hit; what was not asked for stays where nobody else was
    assert (cache.counters.read_experts, cache.counters.hit_experts) == (7, 1)
    assert (cache.counters.prefetch.useful, cache.counters.prefetch.wasted) == (2, 3)
    with cache.lease(1, [0, 3]) as lease:
        demand_right(1, take_all(lease), stored)
    assert (cache.counters.read_experts, cache.counters.hit_experts) == (7, 3)
    cache.prompt_begins(6, 3)  # only the ring is left
    assert cache.counters.prefetch.issued == 6
    settled(cache)


def test_where_no_slot_can_be_had_is_an_error_and_no_dead_lock(tiny_folder: Path) -> None:
    cache = open_cache(tiny_folder, 3, ring=1)
    with cache.lease(1, [0, 1, 2]) as lease:
        take_all(lease)
        with pytest.raises(MemoryPlanError, match=r"layer 2: no slot can be had for 1 experts \(3 slots: 2 leased"):
            take_all(cache.lease(2, [5]))
    with cache.lease(2, [5]) as lease:
        assert list(take_all(lease)) == [5]


def test_prefetch_takes_no_slot_from_what_is_leased_or_resident(tiny_folder: Path, stored: Stored) -> None:
    cache = open_cache(tiny_folder, 6, ring=2, prefetch_width=4)
    with cache.lease(1, [0, 1, 2, 3]) as lease:
        held = take_all(lease)
        cache.hint(2, [0, 1, 2, 3])
        assert cache.counters.prefetch.issued == 2  # the ring
        while cache.is_reading:
            cache.collect(wait=True)
        demand_right(1, held, stored)
    assert cache.resident_experts == 4
    with cache.lease(2, [1, 5]) as lease:
        demand_right(2, take_all(lease), stored)
    counters = cache.counters
    assert (counters.prefetch.useful, counters.prefetch.wasted, counters.hit_experts) == (1, 1, 0)
    assert len(settled(cache)._ring) == 2


def test_a_guess_on_its_way_is_hastened_and_one_that_was_wrong_is_cancelled(tiny_folder: Path, stored: Stored) -> None:
    gate = Gate()
    cache = open_cache(tiny_folder, 8, ring=3, prefetch_width=3, files=FaultyFiles(gate), threads=1)
    cache.hint(1, [0, 1, 2])
    with cache.lease(1, [2, 4]) as lease:
        gate.opened.set()
        demand_right(1, take_all(lease), stored)
    prefetch = cache.counters.prefetch
    assert (prefetch.issued, prefetch.late, prefetch.wasted, prefetch.useful) == (3, 1, 2, 0)
    settled(cache)


def test_a_guess_that_is_being_cancelled_can_be_asked_for(tiny_folder: Path, stored: Stored) -> None:
    gate = Gate()
    cache = open_cache(tiny_folder, 6, ring=1, prefetch_width=1, files=FaultyFiles(gate), threads=1)
    cache.hint(1, [0])
    first = cache.lease(1, [5])  # settles layer 1: the guess is cancelled while it is being read
    second = cache.lease(1, [0])
    gate.opened.set()
    demand_right(1, take_all(second), stored)
    demand_right(1, take_all(first), stored)
    first.release()
    second.release()
    settled(cache)


def test_a_failed_read_raises_where_it_is_leased_and_the_cache_goes_on(tiny_folder: Path, stored: Stored) -> None:
    files = FaultyFiles(io_error)
    cache = open_cache(tiny_folder, 5, ring=1, files=files)
    for _ in range(3):
        with (
            pytest.raises(
                CheckpointError, match=r"safetensors: layer 2, expert [0-7] can't be read: Input/output error"
            ),
            cache.lease(2, list(range(8))) as lease,
        ):
            take_all(lease)
        settled(cache)
    files.fault = None
    with cache.lease(2, [1, 2]) as lease:
        demand_right(2, take_all(lease), stored)


def use(cache: ExpertCache, number: int) -> None:
    """A step of two layers; a lease that Ctrl-C kept out of its block ends with this frame."""
    for layer in (1, 2):
        experts = [(number + at) % 8 for at in range(1 + number % 5)]
        observe(cache, layer, experts)
        with cache.lease(layer, experts, None if number % 2 else experts[:1]) as lease:
            cache.hint(3 - layer, [number % 8, (number + 3) % 8])
            take_all(lease)


# one that comes inside a finalizer is swallowed by Python, with this warning
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_moment_loses_no_slot(tiny_folder: Path, stored: Stored) -> None:
    """A timer raises it in the middle of whatever the cache is doing."""
    cache = open_cache(tiny_folder, 5, ring=2, prefetch_width=2, policy=DEFAULT_POLICY)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = 0
    try:
        for number in range(examples(150)):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + (number * 37 % 100) * 0.00004)
                try:
                    use(cache, number)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                settled(cache)
            except KeyboardInterrupt:  # one from a finalizer comes a moment later, perhaps only in `settled`
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10
    for layer in (1, 2):
        with cache.lease(layer, list(range(8))) as lease:
            for group in lease.ready():
                demand_right(layer, group, stored)
    settled(cache)


def test_a_guess_that_failed_is_read_again_when_it_is_asked_for(tiny_folder: Path, stored: Stored) -> None:
    files = FaultyFiles(io_error)
    cache = open_cache(tiny_folder, 6, ring=2, prefetch_width=2, files=files)
    cache.hint(1, [0, 1])
    while cache.is_reading:
        cache.collect(wait=True)
    assert cache.counters.prefetch.failed == 2
    files.fault = None
    with cache.lease(1, [0, 1]) as lease:
        demand_right(1, take_all(lease), stored)


def test_router_statistics_count_choices_and_weights() -> None:
    stats = RouterStats([2, 5], 6)
    stats.observe(5, torch.tensor([[0, 3], [3, 4]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    assert stats.counts.tolist() == [[0] * 6, [1, 0, 0, 2, 1, 0]]
    assert stats.weight_sums[1].tolist() == [0.25, 0, 0, 1.25, 0.5, 0]
    assert stats.distinct_experts == 3
