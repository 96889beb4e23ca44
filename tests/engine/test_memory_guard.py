"""Memory pressure: experts' memory goes back to the system, the minimum stays, tokens are the same."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

import k2lite
from k2lite.backends.base import Memory
from k2lite.memory_guard import MemoryGuard
from k2lite.offload.cache import ExpertCache
from k2lite.offload.slots import Arena

IDS = [3, 1, 4, 1, 5]
GIB = 1 << 30


def test_pressure_shrinks_the_arena_to_its_minimum_and_changes_no_bit(
    engine: k2lite.Engine, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = engine.logits(IDS)
    other = k2lite.load(tiny_folder, backend="reference", context=64, resident_experts=12)
    cache = other.experts
    assert isinstance(cache, ExpertCache)
    assert torch.equal(other.logits(IDS), expected)
    left = [8 * GIB]
    slot = other.placement.slot_bytes
    guard = MemoryGuard(lambda: Memory(10 * GIB, left[0]), cache, slot)
    assert guard.check(now_s=1e9) == 0
    left[0] = 10 * GIB // 100 - 2 * slot
    assert guard.check(now_s=1e9 + 0.5) == 0, "not more often than once a second"
    assert guard.check(now_s=1e9 + 2) == 2
    assert torch.equal(other.logits(IDS), expected)
    left[0] = 0
    assert guard.check(now_s=1e9 + 4) == 12 - 2 - (3 + other.placement.ring_slots)
    assert guard.check(now_s=1e9 + 6) == 0
    assert torch.equal(other.logits(IDS), expected)
    assert capsys.readouterr().err.count("memory is short") == 1


def test_a_slot_that_was_never_filled_is_given_up_but_not_counted(tiny_folder: Path) -> None:
    other = k2lite.load(tiny_folder, backend="reference", context=64, resident_experts=12)
    cache = other.experts
    assert isinstance(cache, ExpertCache)
    with cache.lease(1, list(range(6))) as lease:
        assert sum(len(group) for group in lease.ready()) == 6
    assert cache.shrink(2) == 2, "one slot after another, until two have given memory back"
    assert (cache.resident_experts, len(cache._free)) == (4, 0)


def test_what_is_given_back_leaves_the_process() -> None:
    arena = Arena(8, 4 << 20)
    for slot in range(8):
        arena.tensor(slot).fill_(1)
    full = psutil.Process().memory_info().rss
    for slot in range(1, 8):
        arena.give_back(slot)
    assert psutil.Process().memory_info().rss < full - (20 << 20)
    assert arena.tensor(0).eq(1).all()
    assert [arena.give_back(slot) for slot in (0, 0)] == [True, False]
