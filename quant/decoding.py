"""The values of a stored weight, span of rows after span, on the CPU in compiled loops: the same bits as
QuantFormat.dequantize, which runs on any device and takes several passes. Formats without a loop are dequantized so.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .formats import FP8_NAME, PACKED_INT
from .types import QuantTensor


def decoded_spans(tensor: QuantTensor, step: int) -> Iterator[torch.Tensor]:
    """`step` rows of a weight on the CPU after one another, the last ones fewer: float32 [step, ...]. A span's memory
    is used again for the next."""
    rows = tensor.shape[0]
    if tensor.format.name not in (FP8_NAME, "bf16", *PACKED_INT):
        values = tensor.dequantize()
        yield from (values[start : start + step] for start in range(0, rows, step))
        return
    memory = torch.empty(min(step, rows), *tensor.shape[1:])
    for start in range(0, rows, step):
        span = memory[: min(step, rows - start)]
        _decode(tensor, start, span)
        yield span


def decoded(tensor: QuantTensor) -> torch.Tensor:
    """All values at once, float32."""
    return next(decoded_spans(tensor, max(1, tensor.shape[0])))


def _decode(tensor: QuantTensor, start: int, span: torch.Tensor) -> None:
    """Fill `span` with the rows from `start` on."""
    from .quantize_kernels import decode_bf16, decode_fp8, decode_integers

    name, parts = tensor.format.name, tensor.parts
    out = span.view(len(span), -1).numpy()
    rows = slice(start, start + len(span))
    if name == FP8_NAME:
        (scales,) = (part for suffix, part in parts.items() if suffix != "weight")
        decode_fp8(parts["weight"][rows].view(torch.uint8).numpy(), scales.numpy(), start, out)
    elif name == "bf16":
        decode_bf16(parts["weight"][rows].view(out.shape).view(torch.int16).numpy().view(np.uint16), out)
    else:
        packed, scales = parts["weight_packed"][rows].view(torch.uint8), parts["weight_scale"][rows]
        scratch = np.empty(out.shape[1], np.uint8)
        decode_integers(packed.numpy(), scales.to(torch.float32).numpy(), PACKED_INT[name][0], out, scratch)
