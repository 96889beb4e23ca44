"""What tests of number formats know by themselves: BF16 rounding, and packed integers as bytes, in numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

# By name: bits of a code, columns of a group (None: the row). Written out here, not read from the code under test.
PACKED = {
    "int4_g32": (4, 32),
    "int4_g64": (4, 64),
    "int4_g128": (4, 128),
    "int8_g128": (8, 128),
    "int8_channel": (8, None),
}


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, nearest even, as 16 bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_round(x: np.ndarray) -> np.ndarray:
    return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32)


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    # rows of very different sizes, so that a wrong block or group is seen
    sizes = 10.0 ** generator.uniform(-3, 3, (rows, 1))
    return torch.from_numpy((generator.standard_normal((rows, columns)) * sizes).astype(np.float32))


def stored_codes(parts: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """Signed codes [out, in] from the bytes of weight_packed: in 4 bits the lower column is the low nibble."""
    bits, _ = PACKED[name]
    packed = parts["weight_packed"].numpy().view(np.uint8).astype(np.int64)
    if bits == 8:
        return packed - 128
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(packed.shape[0], -1) - 8


def in_groups(values: np.ndarray, name: str) -> np.ndarray:
    """[out, in] as [out, groups, columns of a group]."""
    return values.reshape(values.shape[0], -1, PACKED[name][1] or values.shape[1])


def exact_values(parts: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """[out, groups, columns of a group] in float64, where code times scale is exact."""
    scale = parts["weight_scale"].to(torch.float64).numpy()
    return in_groups(stored_codes(parts, name).astype(np.float64), name) * scale[..., None]
