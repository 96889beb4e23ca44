"""Weights stored as floating-point numbers, one tensor a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import CheckpointError
from .formats import Parts, QuantFormat, ScaleSearch, Shape

PLAIN_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Plain(QuantFormat):
    """bf16, f16 or f32; vectors too."""

    name: str

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return {"weight": (PLAIN_DTYPES[self.name], shape)}

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        return parts["weight"].to(torch.float32).view(shape)

    def quantize(
        self, weight: torch.Tensor, *, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Rounded to the nearest; a number too large for the format is an error, never an infinity."""
        self._demand_no_search(scale_search, importance)
        rounded = weight.to(PLAIN_DTYPES[self.name], copy=True).contiguous()  # never the memory of `weight`
        if not torch.isfinite(rounded).all():
            if not torch.isfinite(weight).all():
                raise self.not_finite()
            raise CheckpointError(f"a weight holds {weight.abs().max():g}, which is too large for {self.name}")
        return {"weight": rounded}
