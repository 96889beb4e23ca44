"""The oracle as a backend: a whole model in float64, by the code of oracle.py.

For comparing only. The latent cache stays float32, as the engine keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from k2lite.backends.base import DONE, Backend, Capabilities, Event, Memory, RoutingRule, Segment
from k2lite.backends.host_memory import host_memory
from k2lite.quant.formats import FORMAT_NAMES
from k2lite.quant.types import ExpertWeights, QuantTensor

from . import oracle
from .oracle import Array, exact


class Float64Backend(Backend):
    name: ClassVar[str] = "float64"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset(FORMAT_NAMES), "float64", dtypes=("float64",))

    def memory(self) -> Memory:
        return host_memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE

    def embed(self, ids: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return weight.parts["weight"][ids].double()

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return _tensor(oracle.linear(exact(x), oracle.weight_values(weight)).value)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _tensor(oracle.rms_norm(exact(x), exact(weight), eps))

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return _tensor(oracle.rope(exact(x), exact(cos), exact(sin)))

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = exact(x) @ oracle.weight_values(weight).T
        rows = [oracle.route(row, exact(bias), rule)[:2] for row in logits]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([w for _, w in rows], dtype=torch.float64)

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        return _tensor(oracle.mlp(exact(x), weights).value)

    def combine(self, out: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return _tensor(oracle.combine(exact(out), exact(weights), exact(shared)).value)

    def attention(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, segments: Sequence[Segment], kv_b: QuantTensor, scale: float
    ) -> torch.Tensor:
        parts = [(segment.start, segment.stop, exact(segment.latent)) for segment in segments]
        weights = oracle.weight_values(kv_b)
        return _tensor(oracle.attention(exact(q_nope), exact(q_rope), parts, weights, scale).value)


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
