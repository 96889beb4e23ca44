"""Makes a weight's stored tensors, a block of rows after another, so that memory does not grow with the weight.

INT4 and FP8 are drawn as they are stored, codes and scales, since that is as fast as a disk writes: INT4 codes are
uniform on -7..7 (with 0 twice as likely), FP8 codes follow a Gaussian cut at its largest of 256 quantiles, and scales
vary by a quarter up and down. Every other format quantizes Gaussian values by its own rule. The numbers are pure
functions of the seed and the tensor's name (SFC64), whatever is drawn before.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from k2lite.quant.formats import Shape
from k2lite.quant.fp8 import BLOCK, E4M3_MAX, Fp8Block

from .layout import Weight

Bytes = npt.NDArray[np.uint8]

BLOCK_ELEMENTS = 1 << 22  # 16 MiB as float32
INT4_RMS = (2 * 140 / 16) ** 0.5  # 140 is the sum of the squares of 1 to 7


def draw(weight: Weight, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The stored tensors of one block of rows after another."""
    bits = np.random.SFC64([seed, zlib.crc32(weight.name.encode())])
    for shape in block_shapes(weight.shape):
        if weight.format.name.startswith("int4_"):
            yield _int4(weight, shape, bits)
        elif isinstance(weight.format, Fp8Block):
            yield _fp8(weight, weight.format, shape, bits)
        else:
            yield weight.format.quantize(_gaussian(shape, bits).mul_(weight.std).add_(weight.mean))


def block_shapes(shape: Shape) -> Iterator[Shape]:
    """The shapes of the blocks; rows come in multiples of the FP8 block, so that no scale belongs to two of them."""
    if len(shape) == 1:
        yield shape
        return
    rows = max(BLOCK, BLOCK_ELEMENTS // shape[1] // BLOCK * BLOCK)
    for at in range(0, shape[0], rows):
        yield min(rows, shape[0] - at), shape[1]


def _int4(weight: Weight, shape: Shape, bits: np.random.SFC64) -> dict[str, torch.Tensor]:
    parts = weight.format.parts(shape)
    words, scales = parts["weight_packed"][1], parts["weight_scale"][1]
    packed = torch.from_numpy(_without_minus_8(_random_bytes(bits, 4 * words[0] * words[1])))
    scale = _jittered(bits, scales) * (weight.std / INT4_RMS)
    return {
        "weight_packed": packed.view(torch.int32).view(words),
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor(shape, dtype=torch.int32),
    }


def _fp8(weight: Weight, fp8: Fp8Block, shape: Shape, bits: np.random.SFC64) -> dict[str, torch.Tensor]:
    scales = fp8.parts(shape)[fp8.scale_suffix][1]
    # bytearray.translate looks up a byte a nanosecond, numpy's indexing takes ten
    found = bytearray(_random_bytes(bits, shape[0] * shape[1]).data).translate(_fp8_codes())
    codes = torch.from_numpy(np.frombuffer(found, dtype=np.uint8))
    scale = _jittered(bits, scales) * (weight.std * float(_quantiles(256)[-1]) / E4M3_MAX)
    return {"weight": codes.view(torch.float8_e4m3fn).view(shape), fp8.scale_suffix: scale}


def _gaussian(shape: Shape, bits: np.random.SFC64) -> torch.Tensor:
    """float32 values of a standard Gaussian, each one of its 65,536 quantiles."""
    count = int(np.prod(shape))
    chosen = _random_bytes(bits, 2 * count).view(np.uint16)
    return torch.from_numpy(_quantiles(1 << 16)[chosen]).view(shape)


def _jittered(bits: np.random.SFC64, shape: Shape) -> torch.Tensor:
    """float32 factors from 0.75 to 1.25."""
    chosen = torch.from_numpy(_random_bytes(bits, shape[0] * shape[1])).view(shape)
    return 0.75 + chosen.to(torch.float32) / 510


def _random_bytes(bits: np.random.SFC64, count: int) -> Bytes:
    raw: Bytes = bits.random_raw(-(-count // 8)).view(np.uint8)[:count]
    return raw


@cache
def _quantiles(count: int) -> npt.NDArray[np.float32]:
    """The Gaussian's value in the middle of each of `count` equally likely parts, in rising order."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((at + 0.5) / count) for at in range(count)], dtype=np.float32)


def _without_minus_8(packed: Bytes) -> Bytes:
    """Two INT4 codes plus 8 in each byte: the code -8, which Moonshot's grid does not have, becomes 0."""
    some_bit = packed | packed >> 1 | packed >> 2 | packed >> 3
    return packed | (~some_bit & 0x11) << 3


@cache
def _fp8_codes() -> bytes:
    """A byte to an E4M3 code, the largest being the format's largest."""
    values = torch.from_numpy(_quantiles(256) * np.float32(E4M3_MAX / _quantiles(256)[-1]))
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
