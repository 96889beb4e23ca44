"""Lets a recorded trace choose the experts, so that a model with random weights is measured with real reuse.

Tokens follow the trace in order, from its beginning again when it ends; MoE layer i follows trace layer i, looped. What
the model then computes means nothing; how fast it is does. For measuring only.
Shapes: T tokens, K active experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from k2lite.backends.base import RoutingRule
from k2lite.offload.routing_trace import RoutingTrace
from k2lite.quant.errors import RequestError
from k2lite.quant.types import QuantTensor

from .config import ModelConfig

if TYPE_CHECKING:
    from .engine import Engine


def check_fit(trace: RoutingTrace, config: ModelConfig) -> None:
    """Raise RequestError where a trace's choices are none that the model's routers could make."""
    active, experts = trace.ids.shape[2], int(trace.ids.max()) + 1
    if active != config.num_experts_per_tok or experts > config.n_routed_experts:
        raise RequestError(
            f"the trace has {active} experts a token, numbered up to {experts - 1}, and the model "
            f"{config.num_experts_per_tok} of {config.n_routed_experts}; a trace must have as many, and no others"
        )


class TracedRouter:
    """Takes the place of a backend's `router`; each step must ask once for every MoE layer, in order."""

    def __init__(self, trace: RoutingTrace, config: ModelConfig) -> None:
        check_fit(trace, config)
        self._ids = torch.from_numpy(trace.ids.astype("int64"))
        self._n_layers = len(config.moe_layers)
        self._layer = self._token = 0

    def __call__(
        self,
        x: torch.Tensor,
        weight: QuantTensor,  # noqa: ARG002 (the router's own choice is not asked for)
        bias: torch.Tensor,  # noqa: ARG002
        rule: RoutingRule,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 [T, K] of the next tokens of the trace, all with equal weights."""
        tokens = (self._token + torch.arange(len(x))) % len(self._ids)
        ids = self._ids[tokens, self._layer % self._ids.shape[1]]
        self._layer += 1
        if self._layer == self._n_layers:
            self._layer, self._token = 0, (self._token + len(x)) % len(self._ids)
        weights = torch.full(ids.shape, rule.routed_scaling_factor / ids.shape[1], dtype=torch.float32)
        return ids.to(x.device), weights.to(x.device)


def follow_trace(engine: Engine, trace: RoutingTrace) -> None:
    """Have an engine's routers follow a trace from now on. What the model's own routers guess of the next layer says
    nothing about a trace, so statistics guess alone. Raises RequestError where the two don't fit."""
    engine.backend.router = TracedRouter(trace, engine.config)  # type: ignore[method-assign]
    experts = engine.experts
    hint = experts.hint
    experts.hint = lambda layer, ranked: hint(layer, None)  # type: ignore[method-assign]  # noqa: ARG005
