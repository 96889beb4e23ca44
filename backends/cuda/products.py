"""Products over tensors: which tiles a weight and a number of tokens get, and in which layout tokens are prepared.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from .launch import launch
from .product_kernels import add_splits_kernel, linear_kernel, prepare_kernel, prepare_silu_kernel
from .stored import OUTPUTS, Kind, Stored

FEW_TOKENS = 64  # up to so many, splits are programs of their own; a tile's, where scales take registers too
_SIZE = 1024


def tile(tokens: int, sums: int) -> dict[str, Any]:
    """Tile sizes, warps and stages: more outputs share the tokens where there are many. `sums`: tiles of float32 that a
    program holds at once, which its registers bound; 99 KiB of shared memory must do."""
    if tokens <= 16:
        return {"TOKENS": 16, "OUTPUTS": OUTPUTS, "warps": 4, "stages": 3}
    if tokens <= FEW_TOKENS or sums > 2:
        return {"TOKENS": FEW_TOKENS, "OUTPUTS": OUTPUTS, "warps": 4, "stages": 2}
    return {"TOKENS": 128 if sums == 1 else FEW_TOKENS, "OUTPUTS": 2 * OUTPUTS, "warps": 8, "stages": 2}


def prepare(x: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Tokens float32 [T, K] as a product with a weight of this kind takes them: [T, K]."""
    if kind.format == "exact":
        return x.contiguous()
    tokens, columns = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(tokens, columns, dtype=torch.bfloat16, device=x.device)
    grid = (tokens, -(-columns // _SIZE))
    launch(prepare_kernel, grid, x, out, x.stride(0), columns, FORMAT=kind.format, SIZE=_SIZE)
    return out


def prepare_silu(gate: torch.Tensor, up: torch.Tensor, kind: Kind) -> torch.Tensor:
    """silu(gate) * up of float32 [T, K], prepared."""
    if kind.format == "exact":
        return torch.nn.functional.silu(gate) * up
    tokens, columns = gate.shape
    out = torch.empty(tokens, columns, dtype=torch.bfloat16, device=gate.device)
    grid = (tokens, -(-columns // _SIZE))
    launch(prepare_silu_kernel, grid, gate, up, out, columns, FORMAT=kind.format, SIZE=_SIZE)
    return out


def multiply(x: torch.Tensor, weight: Stored) -> torch.Tensor:
    """Prepared tokens [T, K] times the transpose of a weight [N, K]: float32 [T, N]."""
    tokens, splits = len(x), weight.splits
    separate = splits > 1 and tokens <= FEW_TOKENS
    out = torch.empty(tokens, weight.outputs, device=x.device)
    parts = torch.empty(splits, tokens, weight.outputs, device=x.device) if separate else out
    if not out.numel():
        return out
    shape = tile(tokens, weight.kind.sums + (splits > 1))
    grid = (-(-weight.outputs // shape["OUTPUTS"]), -(-tokens // shape["TOKENS"]), splits if separate else 1)
    launch(
        linear_kernel, grid, x, weight.codes, weight.scales, parts, tokens, weight.outputs, weight.columns, x.stride(0),
        weight.split_columns, **weight.kind.loop(weight.columns, shape["TOKENS"]),
        SPLITS=splits, SEPARATE=separate, **shape,
    )  # fmt: skip
    if separate:
        launch(add_splits_kernel, (-(-out.numel() // _SIZE),), parts, out, out.numel(), SPLITS=splits, SIZE=_SIZE)
    return out
