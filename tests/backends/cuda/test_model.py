"""A small model on the kernels, in the interpreter: as near to the reference as BF16 activations are.

The experts are those that the reference chooses. A router's scores can lie as near to each other as a rounding, then
another expert answers, and what that costs says nothing of the kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import k2lite
from k2lite.backends.base import Backend, RoutingRule
from k2lite.backends.reference import ReferenceBackend
from k2lite.quant.types import QuantTensor
from tests.backends.cuda.interpreted import InterpretedBackend
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

Chosen = tuple[torch.Tensor, torch.Tensor]
IDS = [158, 3, 141]


class _Recorded(ReferenceBackend):
    """Keeps the ids that its routers choose, a tensor [T, K] for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[torch.Tensor] = []

    def router(self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule) -> Chosen:
        ids, weights = super().router(x, weight, bias, rule)
        self.ids.append(ids)
        return ids, weights


class _Led(InterpretedBackend):
    """Takes the recorded ids by a bias above every score; their weights are its own."""

    def __init__(self, ids: list[torch.Tensor]) -> None:
        super().__init__()
        self._ids = iter(ids)

    def router(self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule) -> Chosen:
        rows = []
        for row, ids in zip(x.split(1), next(self._ids), strict=True):
            rows.append(super().router(row, weight, torch.zeros_like(bias).index_fill(0, ids, 2.0), rule))
        ids, weights = (torch.cat(part) for part in zip(*rows, strict=True))
        return ids, weights


def _logits(folder: Path, backend: Backend) -> torch.Tensor:
    with k2lite.load(folder, backend=backend, context=32) as engine:
        return engine.logits(IDS).double()


@torch.inference_mode()
def test_logits_are_as_near_to_the_reference_as_bf16(tmp_path: Path) -> None:
    """Within 1 % of the length of each token's logits."""
    config = tiny_config(num_hidden_layers=2)
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=3), format="fp8")
    recorded = _Recorded()
    theirs = _logits(tmp_path / "model", recorded)
    error = _logits(tmp_path / "model", _Led(recorded.ids)) - theirs
    assert 1e-4 < (error.norm(dim=-1) / theirs.norm(dim=-1)).max() < 1e-2
