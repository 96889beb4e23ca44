"""MLA over tensors: scratch, sizes of pieces and tiles, and the launches of its four kernels.

Shapes: T tokens, H heads, R latent width, P rotary width, V value width, N cached tokens, S pieces.
"""

from __future__ import annotations

import torch

from .attention_kernels import absorb_kernel, merge_kernel, score_kernel, values_kernel
from .launch import launch
from .products import FEW_TOKENS
from .stored import Stored

PIECE = 128  # cached tokens of a program: from there on, more pieces cost more to merge than they give
HEADS = 16  # of a program: with 32, rotary halves spill registers
SCRATCH_BYTES = 256 << 20  # sums of pieces; a prompt's tokens take turns in it
STEP = 16


def attend(
    q_nope: torch.Tensor, q_rope: torch.Tensor, caches: torch.Tensor, longest: int, kv_b: Stored, scale: float
) -> torch.Tensor:
    """Queries [T, H, nope] and [T, H, P], float32, against the caches: float32 [T, H, V].

    caches: int64 [T, 3] on the device, for each token its cache's address (float32 [N, R + P]), floats from row to row,
    and rows that it may see; `longest`: the most that any may see."""
    tokens, heads, nope = q_nope.shape
    rank = kv_b.columns
    value = kv_b.outputs // heads - nope
    pieces = max(1, -(-longest // PIECE))
    device = q_nope.device
    absorbed = torch.empty(tokens, heads, rank, dtype=torch.bfloat16, device=device)
    mixed = torch.empty(tokens, heads, rank, dtype=kv_b.kind.activations, device=device)
    out = torch.empty(tokens, heads, value, device=device)
    kind = kv_b.kind
    shape = {"OUTPUTS": 64, "TOKENS": 16 if tokens <= 16 else FEW_TOKENS}
    blocks = -(-tokens // shape["TOKENS"])
    q_nope, q_rope = (q if q.stride(-1) == 1 else q.contiguous() for q in (q_nope, q_rope))
    launch(
        absorb_kernel, (-(-rank // 64), heads, blocks), q_nope, kv_b.codes, kv_b.scales, absorbed,
        tokens, heads, nope, value, rank, q_nope.stride(0), q_nope.stride(1), **kind.layout(), NOPE=_power(nope, 16),
        **shape,
    )  # fmt: skip
    at_once = max(1, SCRATCH_BYTES // (4 * pieces * heads * (rank + 2)))
    for begin in range(0, tokens, at_once):
        some = slice(begin, begin + at_once)
        _mix(absorbed[some], q_rope[some], caches[some], pieces, scale, mixed[some], kind.format)
    launch(
        values_kernel, (-(-value // 64), heads, blocks), mixed, kv_b.codes, kv_b.scales, out,
        tokens, heads, nope, value, rank, **kind.loop(rank, shape["TOKENS"]), **shape, stages=3,
    )  # fmt: skip
    return out


def _mix(
    absorbed: torch.Tensor,
    q_rope: torch.Tensor,
    caches: torch.Tensor,
    pieces: int,
    scale: float,
    mixed: torch.Tensor,
    format: str,
) -> None:
    """Each head's mean of the latents that its scores weigh: mixed [T, H, R], prepared for value rows of `format`."""
    tokens, heads, rank = absorbed.shape
    sums = torch.empty(tokens, pieces, heads, rank, device=absorbed.device)
    tops, weights = (torch.empty(tokens, pieces, heads, device=absorbed.device) for _ in range(2))
    rotary, width = q_rope.shape[2], _power(rank, 16)
    launch(
        score_kernel, (tokens, -(-heads // HEADS), pieces), absorbed, q_rope, caches, sums, tops, weights, heads, rank,
        rotary, pieces, scale, q_rope.stride(0), q_rope.stride(1),
        HEADS=HEADS, WIDTH=width, ROTARY=_power(rotary, 16), STEP=STEP, PIECE=PIECE, warps=8, stages=2,
    )  # fmt: skip
    launch(
        merge_kernel, (tokens, heads), caches, sums, tops, weights, mixed, heads, rank, pieces,
        FORMAT=format, WIDTH=width, PIECE=PIECE,
    )  # fmt: skip


def _power(number: int, least: int) -> int:
    """The next power of two, which tiles need."""
    return max(least, 1 << (number - 1).bit_length())
