"""FP8 and BF16 rows to INT4 or INT8 by the amax rule, a row at a time: what most of a trillion weights go through.

The bytes are those of decoding, PackedInt.quantize and measuring one after another, which write three arrays of float32
in between; a test compares. Other pairs of formats have no such way.
"""

from __future__ import annotations

import numpy as np
import torch

from .formats import FP8_NAME, QuantFormat
from .packed_int import PackedInt
from .types import QuantTensor

Sums = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def in_one_pass(rows: QuantTensor, target: QuantFormat) -> tuple[dict[str, torch.Tensor], Sums] | None:
    """Stored tensors but weight_shape, and the sums [3] of `measure`; None where this way is not for these formats.
    Raises CheckpointError on NaN or infinity."""
    if not isinstance(target, PackedInt) or rows.format.name not in (FP8_NAME, "bf16") or len(rows.shape) != 2:
        return None
    from .fused_kernels import bf16_to_integers, fp8_to_integers

    shapes = target.parts(rows.shape)
    packed = torch.empty(shapes["weight_packed"][1], dtype=torch.int32)
    scales, sums = np.empty(shapes["weight_scale"][1], np.float32), np.empty((rows.shape[0], 3))
    into = target.max_code, target.bits, packed.view(torch.uint8).numpy(), scales, sums
    if rows.format.name == FP8_NAME:
        (blocks,) = (part for suffix, part in rows.parts.items() if suffix != "weight")
        finite = fp8_to_integers(rows.parts["weight"].view(torch.uint8).numpy(), blocks.numpy(), 0, *into)
    else:
        finite = bf16_to_integers(rows.parts["weight"].view(torch.int16).numpy().view(np.uint16), *into)
    if not finite:
        raise target.not_finite()
    total: Sums = sums.sum(0)
    return {"weight_packed": packed, "weight_scale": torch.from_numpy(scales).to(torch.bfloat16)}, total
