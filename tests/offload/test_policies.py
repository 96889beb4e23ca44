"""What all policies promise, and each one's choice against its definition computed anew from the whole history."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from k2lite.errors import RequestError
from k2lite.offload.next_use_policies import LearnedCyclic
from k2lite.offload.policies import DEFAULT_POLICY, POLICIES, Policy, make_policy
from k2lite.offload.reuse_model import PRIOR, ReuseModel
from tests.samples import examples

N_LAYERS, N_EXPERTS, ACTIVE = 3, 10, 2
History = list[tuple[int, list[int]]]  # (layer, choice) of every event so far
Step = tuple[Policy, History, set[tuple[int, int]], set[tuple[int, int]]]


def steps(name: str, seed: int, slots: int = 9, tokens: int = 30) -> Iterator[Step]:
    """Drive a policy with skewed random choices. Before each victim is taken: the policy, the history, who is resident
    and who is leased, the running event's experts and some others."""
    rng = random.Random(seed)
    policy = make_policy(name, range(N_LAYERS), N_EXPERTS, slots)
    history: History = []
    resident: set[tuple[int, int]] = set()
    for _ in range(tokens):
        for layer in range(N_LAYERS):
            chosen: set[int] = set()
            while len(chosen) < ACTIVE:
                chosen.add(min(int(rng.expovariate(0.3)), N_EXPERTS - 1))
            event = sorted(chosen)
            policy.observe(layer, event)
            history.append((layer, event))
            leased = {(layer, expert) for expert in event}
            for expert in event:
                if (layer, expert) in resident:
                    continue
                if len(resident) == slots:
                    others = sorted(resident - leased)
                    also = leased | set(rng.sample(others, rng.randrange(min(4, len(others)))))
                    yield policy, history, resident, also
                    out = policy.victim(also)
                    policy.evict(*out)
                    resident.remove(out)
                policy.admit(layer, expert)
                resident.add((layer, expert))


@pytest.mark.parametrize("name", POLICIES)
def test_a_victim_is_resident_and_not_leased(name: str) -> None:
    for seed in range(examples(10)):
        n_victims = 0
        for policy, _, resident, leased in steps(name, seed):
            assert policy.victim(leased) in resident - leased
            n_victims += 1
        assert n_victims > 30


@pytest.mark.parametrize("name", POLICIES)
def test_where_everything_is_leased_there_is_no_victim(name: str) -> None:
    policy = make_policy(name, range(2), 4, 3)
    with pytest.raises(RuntimeError, match="leased"):
        policy.victim(set())
    policy.observe(0, [1, 2])
    policy.admit(0, 1)
    policy.admit(0, 2)
    assert policy.victim({(0, 1)}) == (0, 2)
    with pytest.raises(RuntimeError, match="leased"):
        policy.victim({(0, 1), (0, 2)})
    policy.evict(0, 2)
    assert policy.victim(set()) == (0, 1)
    with pytest.raises(ValueError, match="resident already"):
        policy.admit(0, 1)
    with pytest.raises(ValueError, match="not resident"):
        policy.evict(0, 2)


def uses(history: History, layer: int, expert: int) -> tuple[list[int], int]:
    """For each use of an expert how many tokens its layer has routed since, and how many it has routed at all."""
    choices = [event for at, event in history if at == layer]
    return [len(choices) - 1 - index for index, event in enumerate(choices) if expert in event], len(choices)


def distance(history: History, layer: int) -> int:
    steps_to = (layer - history[-1][0]) % N_LAYERS
    return steps_to or N_LAYERS


def lru(history: History, layer: int, expert: int) -> float:
    return max((index for index, (at, event) in enumerate(history) if at == layer and expert in event), default=-1)


def lfu(history: History, layer: int, expert: int) -> float:
    return math.fsum(0.5 ** (age / 32) for age in uses(history, layer, expert)[0])


def lfru(history: History, layer: int, expert: int) -> float:
    ages, _ = uses(history, layer, expert)
    return len(ages) / (min(ages) + 1)


def static(history: History, layer: int, expert: int) -> float:
    return len(uses(history, layer, expert)[0])


def minus_next_use(history: History, layer: int, p: float) -> float:
    return -(distance(history, layer) + N_LAYERS * (1 - p) / p)


def cyclic(history: History, layer: int, expert: int) -> float:
    ages, _ = uses(history, layer, expert)
    rates = [math.fsum(0.5 ** (age / h) for age in ages) * (1 - 0.5 ** (1 / h)) for h in (3, 32)]
    return minus_next_use(history, layer, sum(rates) / 2 + 0.1 * ACTIVE / N_EXPERTS)


# The worth of what stays; ties beyond a billionth are anyone's.
WORTH: dict[str, Callable[[History, int, int], float]] = {
    "lru": lru,
    "lfu": lfu,
    "lfru": lfru,
    "static": static,
    "cyclic": cyclic,
}


@pytest.mark.parametrize("name", WORTH)
def test_the_victim_is_worth_least_by_the_definition(name: str) -> None:
    for seed in range(examples(4)):
        for policy, history, resident, leased in steps(name, seed):
            worth = {key: WORTH[name](history, *key) for key in resident - leased}
            found = policy.victim(leased)
            assert worth[found] <= min(worth.values()) + 1e-9, (history[-1], found, worth)


def test_the_reuse_model_is_its_formula() -> None:
    """Inputs, probabilities and weights by plain loops over the whole history, in float64."""
    rng = random.Random(5)
    model = ReuseModel(N_LAYERS, N_EXPERTS)
    history: History = []
    weights, precision = PRIOR.copy(), np.eye(len(PRIOR)) * 100.0
    inputs: dict[int, list[list[float]]] = {}
    chances: dict[int, list[float]] = {}
    mean = ACTIVE / N_EXPERTS
    for token in range(12):
        if token:
            model.step()
        gradient, information = np.zeros(len(PRIOR)), np.zeros((len(PRIOR), len(PRIOR)))
        for layer in range(N_LAYERS):
            event = rng.sample(range(N_EXPERTS), ACTIVE) if token % 3 else [layer, 7]
            for expert in range(N_EXPERTS) if token else ():
                x, p = np.array(inputs[layer][expert]), chances[layer][expert]
                gradient += x * ((expert in event) - p)
                information += np.outer(x, x) * p * (1 - p)
            history.append((layer, event))
            found = model.observe(layer, event)
            inputs[layer] = [reuse_inputs(history, layer, expert, mean) for expert in range(N_EXPERTS)]
            logits = [float(np.dot(weights, x)) + math.log(mean / (1 - mean)) for x in inputs[layer]]
            chances[layer] = [1 / (1 + math.exp(-logit)) for logit in logits]
            np.testing.assert_allclose(found, chances[layer], rtol=1e-9)
        if token:
            precision = 0.998 * precision + information + 0.002 * 100.0 * np.eye(len(PRIOR))
            weights = weights + np.linalg.solve(precision, gradient)
        else:
            precision = 0.998 * precision + 0.002 * 100.0 * np.eye(len(PRIOR))
    assert np.abs(weights - PRIOR).max() > 0.02  # it learned


def reuse_inputs(history: History, layer: int, expert: int, mean: float) -> list[float]:
    ages, seen_tokens = uses(history, layer, expert)
    row = []
    for half_life in (1, 3, 10, 32, 256):
        keep = 0.5 ** (1 / half_life)
        count = math.fsum(keep**age for age in ages)
        seen = math.fsum(keep**age for age in range(seen_tokens))
        missing = 8.0 if half_life == 256 else 1 / (1 - keep) - seen
        row.append(math.log(2 + (count + missing * mean) / (seen + missing) / mean))
    return [*row, 1.0]


def test_the_default_evicts_what_is_needed_last_by_its_own_probabilities() -> None:
    for policy, history, resident, leased in steps(DEFAULT_POLICY, 3):
        assert isinstance(policy, LearnedCyclic)
        p = policy._keys
        worth = {key: minus_next_use(history, key[0], float(p[key])) for key in resident - leased}
        assert worth[policy.victim(leased)] <= min(worth.values()) + 1e-9


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_fetched_ahead_stays_until_its_layer_s_next_token(name: str) -> None:
    policy = make_policy(name, range(2), 8, 4)
    for layer in [*([0, 1] * 40), 0]:
        policy.observe(layer, [0, 1])
    for key in ((0, 0), (0, 1), (1, 0), (1, 1)):
        policy.admit(*key)
    policy.evict(1, 1)
    policy.admit(1, 5)  # a guess at what layer 1 will use next
    assert policy.victim(set()) != (1, 5)
    for layer in (1, 0):
        policy.observe(layer, [0, 1])
    assert policy.victim(set()) == (1, 5), "a wrong guess goes first"


@pytest.mark.parametrize("name", ["lfu", "lfru", "cyclic", "hazard", "static"])
def test_what_was_learned_serves_a_new_run(name: str) -> None:
    old = make_policy(name, range(2), 8, 4)
    for _ in range(20):
        for layer in range(2):
            old.observe(layer, [2, 3 + layer])
    state = old.state()
    new = make_policy(name, range(2), 8, 4)
    new.restore(state)
    assert all(np.array_equal(state[key], old.state()[key]) for key in state), "the saved arrays are copies"
    new.observe(1, [0, 1])
    for key in ((0, 2), (0, 3), (0, 6), (1, 4)):
        new.admit(*key)
        new.observe(0, [2, 3]) if key == (0, 6) else None
    assert new.victim(set()) == (0, 6)
    other = make_policy(name, range(2), 9, 4)
    with pytest.raises(ValueError, match="shape"):
        other.restore(state)
    with pytest.raises(ValueError, match="have no"):
        other.restore({})
    with pytest.raises(ValueError, match="NaN"):
        new.restore({key: np.full_like(array, np.nan, dtype=np.float64) for key, array in state.items()})


def test_a_static_set_goes_on_learning_until_its_tokens_are_full() -> None:
    """A first turn of three tokens, then a new conversation: what it uses still counts."""
    policy = make_policy("static", range(1), 8, 4)
    for _ in range(3):
        policy.observe(0, [0, 1])
    policy.restore(policy.state())
    for _ in range(61):
        policy.observe(0, [2, 3])
    for _ in range(70):
        policy.observe(0, [4, 5])  # beyond its tokens
    for expert in (0, 2, 4):
        policy.admit(0, expert)
    policy.observe(0, [6, 7])
    assert policy.victim(set()) == (0, 4)
    policy.evict(0, 4)
    assert policy.victim(set()) == (0, 0)


def test_the_default_learns_once_a_token_in_whatever_order_a_batch_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(ReuseModel, "step", lambda _: taken.append(1))
    policy = make_policy(DEFAULT_POLICY, range(N_LAYERS), N_EXPERTS, 5)
    for layer in (0, 1, 2, 0, 0, 1, 1, 2, 2):
        policy.observe(layer, [1, 2])
    assert len(taken) == 3


def test_a_restored_model_keeps_rates_and_gives_them_less_weight() -> None:
    old, new = ReuseModel(1, 4), ReuseModel(1, 4)
    for _ in range(30):
        old.observe(0, [1, 2])
        old.step()
    new.restore(old.state())
    for name in ("counts", "seen"):
        np.testing.assert_allclose(new.state()[name], old.state()[name] / 4)
    np.testing.assert_array_equal(new.weights, old.weights)
    assert old.long_run_rates()[0, 1] > new.long_run_rates()[0, 1] > 0.5 > new.long_run_rates()[0, 0]


def test_an_old_conversation_weighs_less_than_the_new_one() -> None:
    """Experts 0 and 1 were used 40 times before; 2 and 3 are used now, five times."""
    for name in ("cyclic", "hazard", "lfu"):
        old = make_policy(name, range(1), 8, 4)
        for _ in range(40):
            old.observe(0, [0, 1])
        policy = make_policy(name, range(1), 8, 4)
        policy.restore(old.state())
        for _ in range(12):
            policy.observe(0, [2, 3])
        for expert in (0, 1, 2, 3):
            policy.admit(0, expert)
        policy.observe(0, [2, 3])
        assert policy.victim(set()) in {(0, 0), (0, 1)}, name


def test_an_unknown_name_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown; there are hazard, cyclic, lru"):
        make_policy("fifo", range(2), 4, 2)
    with pytest.raises(ValueError, match="0 slots"):
        make_policy("lru", range(2), 4, 0)
    with pytest.raises(ValueError, match="keeps no statistics"):
        make_policy("lru", range(2), 4, 2).restore({"counts": np.zeros((2, 4))})
