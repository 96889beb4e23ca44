"""Replays a routing trace against a policy, or against Belady's optimum, and counts reads. No bytes are moved.

One event is one token's choice in one layer: all its experts are judged at once, then those missed are admitted, each
in the place of a victim that the event itself does not use. A hit is an expert that is resident, that is, one that
needed no read since its last eviction. Slots are a pool over all layers.

Shapes: T tokens, L MoE layers, K active experts, E experts.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k2lite.quant.errors import RequestError

from .policies import POLICIES, Policy, make_policy

BELADY = "belady"
Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Replayed:
    """What was counted after the warm-up. `reads` are misses: nothing is prefetched in a replay."""

    policy: str
    slots: int
    tokens: int
    requests: int
    reads: int

    @property
    def hit_rate(self) -> float:
        return 1 - self.reads / self.requests

    @property
    def reads_per_token(self) -> float:
        return self.reads / self.tokens


def replay(ids: Ids, n_experts: int, policy: str, slots: int, *, warmup_tokens: int = 0) -> Replayed:
    """Replay ids uint16 [T, L, K] with `slots` slots, empty at first. The first `warmup_tokens` are replayed, not
    counted. Raises RequestError where that leaves no token, where an event's experts don't fit, for an unknown name."""
    n_tokens, n_layers, active = ids.shape
    if policy != BELADY and policy not in POLICIES:
        raise RequestError(f"policy {policy!r} is unknown; there are {', '.join((*POLICIES, BELADY))}")
    if not 0 <= warmup_tokens < n_tokens:
        raise RequestError(f"a warm-up of {warmup_tokens} tokens leaves none of the trace's {n_tokens} to count")
    if slots < active:
        raise RequestError(f"{slots} slots can't hold the {active} experts that one token uses in one layer")
    slots = min(slots, n_layers * n_experts)
    if policy == BELADY:
        missed = _belady_misses(ids, n_experts, slots)
    else:
        missed = policy_misses(ids, make_policy(policy, range(n_layers), n_experts, slots), n_experts, slots)
    tokens = n_tokens - warmup_tokens
    return Replayed(policy, slots, tokens, tokens * n_layers * active, int(missed[warmup_tokens:].sum()))


def policy_misses(ids: Ids, policy: Policy, n_experts: int, slots: int) -> npt.NDArray[np.int64]:
    """Misses of each event, int64 [T, L]."""
    n_tokens, n_layers, _ = ids.shape
    resident = np.zeros((n_layers, n_experts), dtype=np.bool_)
    misses = np.zeros((n_tokens, n_layers), dtype=np.int64)
    free = slots
    for token in range(n_tokens):
        for layer in range(n_layers):
            event: list[int] = ids[token, layer].tolist()
            policy.observe(layer, event)
            leased = {(layer, expert) for expert in event}
            for expert in event:
                if resident[layer, expert]:
                    continue
                misses[token, layer] += 1
                if free:
                    free -= 1
                else:
                    out = policy.victim(leased)
                    policy.evict(*out)
                    resident[out] = False
                resident[layer, expert] = True
                policy.admit(layer, expert)
    return misses


def next_uses(ids: Ids, n_experts: int) -> npt.NDArray[np.int64]:
    """The event (token * L + layer) at which each expert of each event is used next, int64 [T, L, K]; a number
    beyond all events where it is not."""
    n_tokens, n_layers, _ = ids.shape
    upcoming = np.full((n_layers, n_experts), n_tokens * n_layers, dtype=np.int64)
    result = np.empty(ids.shape, dtype=np.int64)
    layers = np.arange(n_layers)
    rows = layers[:, None]
    for token in range(n_tokens - 1, -1, -1):
        result[token] = upcoming[rows, ids[token]]
        upcoming[rows, ids[token]] = token * n_layers + rows
    return result


def _belady_misses(ids: Ids, n_experts: int, slots: int) -> npt.NDArray[np.int64]:
    """Misses [T, L] of the policy that evicts what is needed last (Belady 1966), none of the event's own."""
    n_tokens, n_layers, _ = ids.shape
    upcoming = next_uses(ids, n_experts)
    misses = np.zeros((n_tokens, n_layers), dtype=np.int64)
    due: dict[tuple[int, int], int] = {}  # who is resident, and when it is needed next
    heap: list[tuple[int, tuple[int, int]]] = []  # (-due, expert); what is out of date is dropped when it comes up
    for token in range(n_tokens):
        for layer in range(n_layers):
            event = {
                (layer, expert): int(at)
                for expert, at in zip(ids[token, layer].tolist(), upcoming[token, layer], strict=True)
            }
            missed = [key for key in event if key not in due]
            misses[token, layer] = len(missed)
            due |= {key: at for key, at in event.items() if key in due}
            for key in missed:
                if len(due) >= slots:
                    _evict_last_needed(due, heap, event)
                due[key] = event[key]
            for key, at in event.items():
                heapq.heappush(heap, (-at, key))
    return misses


def _evict_last_needed(
    due: dict[tuple[int, int], int], heap: list[tuple[int, tuple[int, int]]], event: dict[tuple[int, int], int]
) -> None:
    """The event's own entries are pushed after it, so what is found of them here is out of date."""
    while True:
        negative, key = heapq.heappop(heap)
        if key not in event and due.get(key) == -negative:
            del due[key]
            return


def count_of(text: str, total: int, option: str) -> int:
    """A count, or a share of `total` such as 5% rounded to the nearest. Raises RequestError."""
    try:
        count = round(float(text[:-1]) / 100 * total) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        count = -1
    if count < 0:
        raise RequestError(f"{option} {text!r} is neither a count nor a share such as 5%")
    return count
