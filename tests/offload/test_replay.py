"""Replay: Belady's optimum against exhaustive search, what holds for every policy, and the figures on file."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from k2lite.errors import RequestError
from k2lite.offload.policies import DEFAULT_POLICY, POLICIES
from k2lite.offload.replay import BELADY, count_of, replay
from k2lite.offload.routing_trace import read_trace
from tests.samples import examples
from tools.synthetic_routing import synthetic_routing

KIMI = "traces/kimi-linear_olmoe/trace_kimi_300.jsonl"
OLMOE = "traces/kimi-linear_olmoe/trace_olmoe_299.jsonl"
SHARES = ("5%", "10%", "20%", "30%")


def fewest_misses(ids: npt.NDArray[np.uint16], slots: int) -> int:
    """By trying every set of victims at every event."""
    events = [frozenset((layer, int(e)) for e in row) for token in ids for layer, row in enumerate(token)]

    @cache
    def search(at: int, resident: frozenset[tuple[int, int]]) -> int:
        if at == len(events):
            return 0
        missed = events[at] - resident
        together = resident | missed
        out = max(0, len(together) - slots)
        rest = sorted(together - events[at])
        return len(missed) + min(search(at + 1, together - set(gone)) for gone in combinations(rest, out))

    return search(0, frozenset())


def test_belady_is_the_optimum() -> None:
    rng = np.random.default_rng(0)
    for _ in range(examples(12)):
        n_layers, slots = int(rng.integers(1, 4)), int(rng.integers(2, 6))
        ids = np.array([[rng.permutation(4)[:2] for _ in range(n_layers)] for _ in range(7)], dtype=np.uint16)
        assert replay(ids, 4, BELADY, slots).reads == fewest_misses(ids, slots)


@pytest.mark.parametrize("slots", [8, 40, 100, 192])
def test_no_policy_beats_belady_and_all_count_alike(slots: int) -> None:
    ids = synthetic_routing(40, 6, 32, 4, seed=slots)
    best = replay(ids, 32, BELADY, slots, warmup_tokens=0)
    distinct = sum(len(np.unique(ids[:, layer])) for layer in range(6))
    for name in POLICIES:
        run = replay(ids, 32, name, slots)
        assert run.requests == best.requests == ids.size
        assert distinct <= best.reads <= run.reads <= ids.size
        assert (run.hit_rate, run.reads_per_token) == (1 - run.reads / ids.size, run.reads / 40)
        if slots == 192:
            assert run.reads == distinct


@pytest.mark.parametrize("name", [*POLICIES, BELADY])
def test_the_future_is_not_known_and_the_warm_up_is_not_counted(name: str) -> None:
    """Reads of the first half are the same whatever follows, save for the one who looks ahead."""
    ids = synthetic_routing(40, 4, 32, 4, seed=1)
    other = np.concatenate([ids[:20], synthetic_routing(20, 4, 32, 4, seed=2)])
    whole, later = replay(ids, 32, name, 30), replay(ids, 32, name, 30, warmup_tokens=20)
    assert (later.tokens, later.requests) == (20, 20 * 16)
    first_half = whole.reads - later.reads
    same = first_half == replay(other, 32, name, 30).reads - replay(other, 32, name, 30, warmup_tokens=20).reads
    assert same or name == BELADY


def hit_rates(path: Path, policy: str, shares: tuple[str, ...]) -> list[float]:
    trace = read_trace(path)
    ids, n_experts = trace.ids, trace.model.n_experts
    total = ids.shape[1] * n_experts
    warmup = len(ids) // 4
    slots = [count_of(share, total, "share") for share in shares]
    return [replay(ids, n_experts, policy, count, warmup_tokens=warmup).hit_rate for count in slots]


@pytest.mark.parametrize(
    ("policy", "shares", "on_file"),
    [
        ("lru", SHARES, [0.356, 0.539, 0.674, 0.775]),
        (BELADY, SHARES, [0.606, 0.723, 0.839, 0.899]),
        ("cyclic", ("5%", "20%"), [0.4289, 0.7010]),
    ],
)
def test_the_figures_on_file_come_out(shared: Path, policy: str, shares: tuple[str, ...], on_file: list[float]) -> None:
    np.testing.assert_allclose(hit_rates(shared / KIMI, policy, shares), on_file, atol=0.003)


def test_the_default_reaches_its_marks_and_beats_two_rates_on_both_traces(shared: Path) -> None:
    ours = hit_rates(shared / KIMI, DEFAULT_POLICY, SHARES)
    assert all(rate >= mark for rate, mark in zip(ours, (0.44, 0.57, 0.705, 0.795), strict=True)), ours
    ours, two_rates = (hit_rates(shared / OLMOE, policy, ("10%", "20%")) for policy in (DEFAULT_POLICY, "cyclic"))
    assert all(a > b + 0.01 for a, b in zip(ours, two_rates, strict=True)), (ours, two_rates)


def test_what_can_t_be_replayed_is_refused() -> None:
    ids = synthetic_routing(4, 2, 8, 2, seed=0)
    with pytest.raises(RequestError, match="leaves none of the trace's 4"):
        replay(ids, 8, "lru", 4, warmup_tokens=4)
    with pytest.raises(RequestError, match="1 slots can't hold the 2 experts"):
        replay(ids, 8, "lru", 1)
    with pytest.raises(RequestError, match=r"'lur' is unknown; there are .*belady"):
        replay(ids, 8, "lur", 4)
    assert replay(ids, 8, "lru", 1000).slots == 16


@pytest.mark.parametrize(("text", "count"), [("5%", 10), ("0.26%", 1), ("100%", 200), ("7", 7), ("0", 0)])
def test_shares_and_counts(text: str, count: int) -> None:
    assert count_of(text, 200, "--slots") == count


@pytest.mark.parametrize("text", ["", "%", "5 percent", "-1", "-5%", "nan%", "inf%", "1.5"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--slots"):
        count_of(text, 200, "--slots")
