"""The experts that were used most, from saved statistics: who lives on the accelerator where experts are split.

Invariant: the set follows from the file and from how many have room, and its digest names it in the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from k2lite.offload.saved_statistics import load_statistics
from k2lite.quant.errors import RequestError
from k2lite.quant.types import ExpertKey

from .config import ModelConfig
from .learned_routing import traced_model


@dataclass(frozen=True)
class HotExperts:
    """All experts of a model, the most used first; ties go to the lower layer and the lower number."""

    ranked: tuple[ExpertKey, ...]

    @classmethod
    def read(cls, path: Path, config: ModelConfig) -> HotExperts:
        """From a file of statistics. Raises RequestError."""
        parts = load_statistics(path, traced_model(config))
        uses = parts.get("router", {}).get("uses")
        if uses is None or uses.shape != (len(config.moe_layers), config.n_routed_experts):
            raise RequestError(f"{path}: holds no use counts of this model's experts")
        order = np.argsort(-uses.astype(np.float64).ravel(), kind="stable").tolist()
        experts = config.n_routed_experts
        return cls(tuple(ExpertKey(config.moe_layers[at // experts], at % experts) for at in order))

    def hottest(self, count: int) -> tuple[ExpertKey, ...]:
        """The `count` most used, in the model's order."""
        return tuple(sorted(self.ranked[:count]))

    def digest(self, count: int) -> str:
        """Eight hexadecimal digits that name the set."""
        return xxhash.xxh3_64_hexdigest(repr([tuple(key) for key in self.hottest(count)]).encode())[:8]
