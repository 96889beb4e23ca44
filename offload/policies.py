"""The cache policies by name. Belady's optimum, which must know the future, is in replay.py only."""

from __future__ import annotations

from collections.abc import Sequence

from k2lite.quant.errors import RequestError

from .counting_policies import FrequencyOverAge, LeastFrequentlyUsed, LeastRecentlyUsed, StaticSet
from .next_use_policies import LearnedCyclic, TwoRateCyclic
from .policy import Policy

__all__ = ["DEFAULT_POLICY", "POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        LearnedCyclic,
        TwoRateCyclic,
        LeastRecentlyUsed,
        LeastFrequentlyUsed,
        FrequencyOverAge,
        StaticSet,
    )
}
DEFAULT_POLICY = LearnedCyclic.name


def make_policy(name: str, layers: Sequence[int], n_experts: int, slots: int) -> Policy:
    """A policy for `slots` slots over all of `layers` together. Raises RequestError for an unknown name."""
    if name not in POLICIES:
        raise RequestError(f"policy {name!r} is unknown; there are {', '.join(POLICIES)}")
    return POLICIES[name](layers, n_experts, slots)
