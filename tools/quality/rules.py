"""The rules that are compared: a format for each matrix, and how its numbers are chosen.

Q4_0 and Q8_0 are llama.cpp's block formats by the gguf package, an implementation that shares nothing with ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import gguf
import numpy as np
import torch

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.conversion import converted_tensor
from k2lite.quant.formats import ScaleSearch
from k2lite.quant.method import HessianSource, Method
from k2lite.quant.moments import Moments
from k2lite.quant.quantization_plan import plan_quantization
from k2lite.quant.recipe import KEEP, Recipe, Rule

Scope = Literal["experts", "all"]
# Rows of 64 and of 96 columns hold no group of 128.
NARROW = {
    "int4_g128": (Rule(r".*mlp\.experts\..*down_proj", "int4_g64"),),
    "int8_g128": (Rule(r".*experts\..*down_proj", "int8_channel"), Rule(r".*kv_b_proj", "int8_channel")),
}


@dataclass(frozen=True)
class Way:
    """`format` is one of k2lite's, "as shipped", "bf16", or a name of gguf's."""

    format: str
    scope: Scope = "experts"
    scale_search: ScaleSearch = "amax"
    knows: Literal["", "importance", "gptq"] = ""

    @property
    def base(self) -> str:
        """The rule that its KL is compared with: the plain search in the same format, or in int4_g32."""
        format = self.format if self.format.startswith("int4") else "int4_g32"
        return Way(format, self.scope if self.format != "as shipped" else "all", "mse").title

    @property
    def title(self) -> str:
        return f"{self.name}, {'experts' if self.scope == 'experts' else 'all matrices'}"

    @property
    def name(self) -> str:
        parts = [self.format, *([self.scale_search] if self.format.startswith("int4") else []), self.knows]
        return " ".join(part for part in parts if part)


WAYS = (
    Way("bf16", "all"),
    Way("as shipped", "all"),
    Way("int8_g128", "all"),
    Way("Q8_0", "all"),
    Way("int4_g32"),
    Way("Q4_0"),
    Way("int4_g32", scale_search="mse"),
    Way("int4_g32", scale_search="mse", knows="importance"),
    Way("int4_g32", knows="gptq"),
    Way("int4_g32", scale_search="mse", knows="gptq"),
    Way("int4_g128"),
    Way("int4_g128", scale_search="mse"),
    Way("int4_g128", scale_search="mse", knows="importance"),
    Way("int4_g128", scale_search="mse", knows="gptq"),
    Way("int4_g32", "all"),
    Way("Q4_0", "all"),
    Way("int4_g32", "all", scale_search="mse"),
    Way("int4_g32", "all", scale_search="mse", knows="importance"),
    Way("int4_g32", "all", scale_search="mse", knows="gptq"),
)


def values_after(
    way: Way, checkpoint: Checkpoint, values: Mapping[str, torch.Tensor], moments: Moments, hessians: HessianSource
) -> dict[str, torch.Tensor]:
    """All weights, float32, as they are after `way`. `values` are the checkpoint's own. What `way` leaves alone is
    BF16, but for "as shipped"."""
    if way.format == "as shipped":
        return dict(values)
    made = {
        name: value.to(torch.bfloat16).to(torch.float32) if value.dim() == 2 else value
        for name, value in values.items()
    }
    if way.format == "bf16":
        return made
    recipe = Recipe(experts="int4_g32", trunk="int4_g32" if way.scope == "all" else KEEP, lm_head=KEEP)
    changed = [matrix for matrix in plan_quantization(checkpoint, recipe).matrices if not matrix.is_kept]
    if way.format in ("Q4_0", "Q8_0"):
        kind = gguf.GGMLQuantizationType[way.format]
        for matrix in changed:
            blocks = gguf.quants.quantize(values[matrix.module].numpy(), kind)
            made[matrix.module] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).astype(np.float32))
        return made
    recipe = Recipe(
        experts=way.format,
        trunk=way.format if way.scope == "all" else KEEP,
        lm_head=KEEP,
        rules=NARROW.get(way.format, ()),
        scale_search=way.scale_search,
    )
    method = Method(
        way.scale_search,
        moments if way.knows == "importance" else None,
        hessians if way.knows == "gptq" else None,
    )
    for matrix in plan_quantization(checkpoint, recipe).matrices:
        if not matrix.is_kept:
            made[matrix.module] = converted_tensor(matrix, method).dequantize()
    return made
