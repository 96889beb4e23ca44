"""FP8 and BF16 rows to INT4 or INT8, a few rows at a time: what most of a trillion weights go through.

The bytes are those of decoding and PackedInt.quantize one after another, which write arrays of float32 in between; a
test compares. Sums of squares are right to 1e-7. Other pairs of formats have no such way.
"""

from __future__ import annotations

import numpy as np
import torch

from .formats import FP8_NAME, QuantFormat, ScaleSearch
from .packed_int import PackedInt
from .types import QuantTensor

Sums = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def in_one_pass(
    rows: QuantTensor, target: QuantFormat, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], Sums] | None:
    """Stored tensors but weight_shape, and the sums [3] of `measure`; None where this way is not for these formats.
    importance is as PackedInt.quantize takes it. Raises CheckpointError on NaN or infinity."""
    if not isinstance(target, PackedInt) or rows.format.name not in (FP8_NAME, "bf16") or len(rows.shape) != 2:
        return None
    from .fused_kernels import bf16_to_integers, fp8_to_integers
    from .scale_search import FACTORS

    factors = FACTORS[target.max_code] if scale_search == "mse" else None
    by_group = target.demand_importance(scale_search, importance, rows.shape[1])
    weights = None if by_group is None else by_group.flatten().numpy()
    shapes = target.parts(rows.shape)
    packed = torch.empty(shapes["weight_packed"][1], dtype=torch.int32)
    scales, sums = np.empty(shapes["weight_scale"][1], np.float32), np.empty((rows.shape[0], 3))
    into = target.max_code, target.bits, factors, weights, packed.view(torch.uint8).numpy(), scales, sums
    if rows.format.name == FP8_NAME:
        (blocks,) = (part for suffix, part in rows.parts.items() if suffix != "weight")
        finite = fp8_to_integers(rows.parts["weight"].view(torch.uint8).numpy(), blocks.numpy(), *into)
    else:
        finite = bf16_to_integers(rows.parts["weight"].view(torch.int16).numpy().view(np.uint16), *into)
    if not finite:
        raise target.not_finite()
    total: Sums = sums.sum(0)
    return {"weight_packed": packed, "weight_scale": torch.from_numpy(scales).to(torch.bfloat16)}, total
