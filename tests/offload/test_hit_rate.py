"""What the replay promises is what the cache does: the same misses, event by event."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from k2lite.offload.policies import POLICIES, make_policy
from k2lite.offload.replay import policy_misses
from tests.offload.caches import FaultyFiles, open_cache, random_delays
from tests.offload.test_lease import settled, take_all

TOKENS, LAYERS, EXPERTS, ACTIVE = 40, (1, 2), 8, 3


def skewed_choices(seed: int) -> np.ndarray:
    """uint16 [T, L, K], ascending: some experts are liked for a while."""
    drawn = np.random.default_rng(seed)
    liking = np.zeros((len(LAYERS), EXPERTS))
    ids = np.empty((TOKENS, len(LAYERS), ACTIVE), dtype=np.uint16)
    for token in range(TOKENS):
        liking = 0.8 * liking + drawn.normal(size=liking.shape)
        scores = liking + drawn.gumbel(size=liking.shape)
        ids[token] = np.sort(np.argsort(-scores, axis=1)[:, :ACTIVE], axis=1)
    return ids


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [5, 9])
def test_the_cache_misses_what_the_replay_misses(tiny_folder: Path, policy: str, slots: int) -> None:
    ids = skewed_choices(slots)
    cache = open_cache(tiny_folder, slots, ring=1, policy=policy, files=FaultyFiles(random_delays(1, 0.0005)))
    misses = np.zeros((TOKENS, len(LAYERS)), dtype=np.int64)
    for token in range(TOKENS):
        for row, layer in enumerate(LAYERS):
            chosen = torch.from_numpy(ids[token, row].astype(np.int64))
            before = cache.counters.hit_experts
            cache.observe(layer, chosen[None], torch.ones(1, ACTIVE))
            with cache.lease(layer, chosen.tolist()) as lease:
                take_all(lease)
            misses[token, row] = ACTIVE - (cache.counters.hit_experts - before)
    expected = policy_misses(ids, make_policy(policy, range(len(LAYERS)), EXPERTS, slots - 1), EXPERTS, slots - 1)
    np.testing.assert_array_equal(misses, expected)
    assert cache.counters.read_experts == expected.sum()
    settled(cache)
    cache.close()
