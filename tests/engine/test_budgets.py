"""Placement decides speed, never tokens: any budget, prefetch, chunk and order of arrival gives the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import k2lite
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.errors import MemoryPlanError, RequestError
from k2lite.moe import DECODE_TOKENS, RECENT_TOKENS
from k2lite.offload.cache import ExpertCache
from k2lite.offload.policies import POLICIES
from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.offload.caches import FaultyFiles, random_delays
from tests.samples import examples

IDS = [(5 * i + i * i) % 160 for i in range(15)]
NEVER: frozenset[int] = frozenset()
PREFETCH = ("off", "on", "wrong")
BACKENDS = ("reference", "cpu")
MINIMUM = 4  # three experts of a layer and one more


@contextmanager
def opened(
    folder: Path, prefetch: str, seed: int, *, backend: str = "reference", **options: object
) -> Iterator[tuple[k2lite.Engine, ExpertCache]]:
    """An engine whose drive answers late and in any order; "wrong" guesses are what the router likes least."""
    engine = k2lite.load(folder, backend=backend, prefetch=prefetch != "off", **options)  # type: ignore[arg-type]
    cache = engine.experts
    assert isinstance(cache, ExpertCache)
    cache.store.files = FaultyFiles(random_delays(seed))
    if prefetch == "wrong":
        cache.hint = partial(hint_wrong, cache.hint, engine.config.n_routed_experts)  # type: ignore[method-assign]
    with engine:
        yield engine, cache


def hint_wrong(hint: object, n_experts: int, layer: int, ranked: Sequence[int]) -> None:
    hint(layer, [expert for expert in range(n_experts) if expert not in ranked])  # type: ignore[operator]


def greedy(engine: k2lite.Engine, ids: list[int], tokens: int) -> list[int]:
    return list(map(int, engine.generate(ids, max_tokens=tokens, temperature=0, stop_ids=NEVER)))


@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("slots", [MINIMUM, 7, 15])
def test_every_budget_gives_the_same_tokens(
    engine: k2lite.Engine, tiny_folder: Path, slots: int, prefetch: str
) -> None:
    with opened(tiny_folder, prefetch, slots, resident_experts=slots, context=64) as (small, cache):
        assert greedy(small, IDS[:6], 6) == greedy(engine, IDS[:6], 6)
        assert cache.resident_experts <= slots
        counters = cache.counters
        assert counters.requested_experts - counters.hit_experts <= counters.read_experts
        assert (counters.prefetch.issued > 0) == (prefetch != "off")
        assert counters.prefetch.useful + counters.prefetch.late <= counters.prefetch.issued
        if prefetch == "on" and slots == MINIMUM:
            assert counters.prefetch.useful + counters.prefetch.late > counters.prefetch.wasted


@given(
    slots=st.integers(MINIMUM, 16),
    prefetch=st.sampled_from(PREFETCH),
    chunk=st.integers(1, 15),
    policy=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 999),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=examples(6), deadline=None)
def test_logits_are_the_same_bits(
    tiny_folder: Path, slots: int, prefetch: str, chunk: int, policy: str, seed: int, backend: str
) -> None:
    with k2lite.load(tiny_folder, backend=backend, context=64) as whole:
        expected = whole.logits(IDS)
    options = {"resident_experts": slots, "policy": policy, "context": 64}
    with opened(tiny_folder, prefetch, seed, backend=backend, **options) as (small, _):
        with small.open(64) as sequence:
            assert torch.equal(small.prefill(sequence, IDS, chunk_tokens=chunk), expected[-1])
        assert torch.equal(small.logits(IDS), expected)


def test_of_a_prompt_what_its_last_tokens_used_is_kept(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = k2lite.load(tiny_folder, backend="cpu", context=64)
    chosen: list[torch.Tensor] = []
    kept: list[object] = []
    lease = other.experts.lease
    other.experts.observers = (lambda _layer, ids, _weights: chosen.append(ids),)
    monkeypatch.setattr(
        other.experts, "lease", lambda layer, experts, keep=None: kept.append(keep) or lease(layer, experts, keep)
    )
    other.logits(IDS)
    assert len(IDS) <= DECODE_TOKENS
    assert kept == [None, None]
    other.logits([*IDS, *IDS])
    for ids, keep in zip(chosen[2:], kept[2:], strict=True):
        assert keep == sorted({int(expert) for row in ids[-RECENT_TOKENS:] for expert in row})


@given(seed=st.integers(0, 999))
@settings(max_examples=examples(2), deadline=None)
def test_random_models_at_the_minimum(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    drawn = random.Random(seed)
    active = drawn.randint(1, 4)
    config = tiny_config(
        hidden_size=32 * drawn.randint(1, 3),
        moe_intermediate_size=32 * drawn.randint(1, 2),
        num_hidden_layers=drawn.randint(2, 4),
        first_k_dense_replace=drawn.randint(0, 1),
        n_routed_experts=drawn.randint(active + 1, 12),
        num_experts_per_tok=active,
    )
    folder = tmp_path_factory.mktemp("random") / "model"
    write_checkpoint(folder, config, random_weights(config, seed=seed), format=drawn.choice(["fp8", "int4", "bf16"]))
    ids = IDS[:7]
    for backend in BACKENDS:
        with k2lite.load(folder, backend=backend, context=32) as whole:
            expected, tokens = whole.logits(ids), greedy(whole, ids, 4)
        for prefetch in PREFETCH:
            few = active + 1
            with opened(folder, prefetch, seed, backend=backend, resident_experts=few, context=32) as (small, _):
                assert torch.equal(small.logits(ids), expected)
                assert greedy(small, ids, 4) == tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_demo_at_the_minimum(backend: str) -> None:
    ids = [2, 700, 31]
    with k2lite.load(DEMO_FOLDER, backend=backend, context=64) as whole:
        expected = whole.logits(ids)
    with k2lite.load(DEMO_FOLDER, backend=backend, context=64, resident_experts=7) as small:
        assert small.placement.slots == 7
        assert torch.equal(small.logits(ids), expected)


def test_a_budget_in_bytes_decides_the_slots(tiny_folder: Path) -> None:
    whole = k2lite.load(tiny_folder, context=64).placement
    assert whole.everything_fits
    assert whole.ring_slots == 0
    other = whole.trunk_bytes + whole.kv_bytes + whole.headroom_bytes
    small = k2lite.load(tiny_folder, context=64, ram=other + 12 * whole.slot_bytes).placement
    assert (small.slots, small.ring_slots) == ((12 * small.slot_bytes - small.transient_bytes) // small.slot_bytes, 1)
    assert 4 <= small.slots < 12  # a step's bytes take the room of some
    assert small.total_bytes <= small.budget_bytes < small.total_bytes + small.slot_bytes
    assert f"{small.slots} of 16 experts" in str(small)
    with pytest.raises(MemoryPlanError, match=r"trunk .* \+ KV for 64 tokens .* \+ a step .* \+ 4 experts .* = "):
        k2lite.load(tiny_folder, context=64, ram=other + 3 * whole.slot_bytes)
    with pytest.raises(MemoryPlanError, match="--ram 8192.00 GiB is more than the .* that is available"):
        k2lite.load(tiny_folder, ram="8TiB")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [(3, "makes 3 slots; one layer's choice and one more take 4"), (0.1, "makes 2 slots"), (0, "above 0"),
     (1.5, "up to 1.0"), (-1, "above 0")],
)  # fmt: skip
def test_a_share_or_number_that_can_t_be_is_refused(tiny_folder: Path, wanted: float, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        k2lite.load(tiny_folder, resident_experts=wanted)


def test_an_unknown_policy_lists_the_known(tiny_folder: Path) -> None:
    with pytest.raises(RequestError, match="policy 'best' is unknown; there are .*lru"):
        k2lite.load(tiny_folder, policy="best")
