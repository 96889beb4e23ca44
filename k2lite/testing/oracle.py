"""Every operation of the seam once more, in float64 numpy, from the papers: what backends are held against.

Shares no code with backends/ or with quant/'s dequantization. Beside each value stands its magnitude, the root of the
summed squares of what was added up for it: an error is judged against that, since a sum may cancel to nothing.
Shapes: T tokens, D hidden, F expert width, E experts, K active experts, H heads, N cached tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from k2lite.backends.base import RoutingRule
from k2lite.quant.types import ExpertWeights, QuantTensor

Array = npt.NDArray[np.float64]
BLOCK = 128


class Judged(NamedTuple):
    """Values, and the magnitude of what was summed for each."""

    value: Array
    magnitude: Array


def exact(tensor: torch.Tensor) -> Array:
    """A floating-point tensor's values."""
    array: Array = tensor.detach().cpu().to(torch.float64).numpy()
    return array


def weight_values(weight: QuantTensor) -> Array:
    """[out, in], decoded here from the stored parts."""
    parts = {suffix: part.cpu() for suffix, part in weight.parts.items()}
    if "weight_packed" in parts:
        return _packed(parts, weight.shape[1])
    values = exact(parts["weight"])
    for suffix, scale in parts.items():
        if suffix.startswith("weight_scale"):
            rows, columns = (np.arange(size) // BLOCK for size in weight.shape)
            values = values * exact(scale)[np.ix_(rows, columns)]
    return values


def _packed(parts: Mapping[str, torch.Tensor], columns: int) -> Array:
    words = parts["weight_packed"].contiguous().numpy().astype("<i4").view("<u4")
    bits = 32 * words.shape[1] // columns
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[:, :, None] >> shifts & np.uint32((1 << bits) - 1)).reshape(len(words), columns)
    scale = exact(parts["weight_scale"])
    values: Array = (codes.astype(np.float64) - (1 << (bits - 1))) * np.repeat(scale, columns // scale.shape[1], axis=1)
    return values


def linear(x: Array, weight: Array) -> Judged:
    """The magnitude is what a sum of such numbers has whatever meets what: an outlier of x that meets a weight of zero
    still is what activations are rounded by."""
    lengths = np.sqrt(np.square(x).sum(axis=1, keepdims=True) * np.square(weight).sum(axis=1))
    return Judged(x @ weight.T, lengths / np.sqrt(max(1, x.shape[1])))


def silu(x: Array) -> Array:
    # exp of a large negative number's opposite overflows; the limit is zero
    result: Array = x / (1 + np.exp(-np.maximum(x, -700.0)))
    return result


def mlp(x: Array, expert: ExpertWeights) -> Judged:
    """down(silu(gate(x)) * up(x))."""
    gate, up, down = (weight_values(matrix) for matrix in expert)
    return linear(silu(x @ gate.T) * (x @ up.T), down)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    result: Array = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight
    return result


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Complex numbers: the pair (2i, 2i + 1) times cos + i sin."""
    turn = (cos + 1j * sin).reshape(len(x), *([1] * (x.ndim - 2)), cos.shape[1])
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    result: Array = np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)
    return result


def route(logits: Array, bias: Array, rule: RoutingRule) -> tuple[list[int], list[float], float]:
    """One token's experts in ascending order, their weights, and the margin: how far the scores were from another
    choice. DeepSeek-V3, section 2.1.2; ties go to the lowest id."""
    scores = 1 / (1 + np.exp(-np.maximum(logits, -700.0)))
    choice = scores + bias
    allowed = list(range(len(choice)))
    margin = np.inf
    if rule.n_group > 1:
        size = len(choice) // rule.n_group
        strength = [float(np.sort(choice[at : at + size])[-2:].sum()) for at in range(0, len(choice), size)]
        groups = sorted(range(rule.n_group), key=lambda group: (-strength[group], group))
        if rule.topk_group < rule.n_group:
            margin = strength[groups[rule.topk_group - 1]] - strength[groups[rule.topk_group]]
        allowed = [expert for expert in allowed if expert // size in groups[: rule.topk_group]]
    ranked = sorted(allowed, key=lambda expert: (-choice[expert], expert))
    k = rule.num_experts_per_tok
    if len(ranked) > k:
        margin = min(margin, float(choice[ranked[k - 1]] - choice[ranked[k]]))
    ids = sorted(ranked[:k])
    total = float(scores[ids].sum()) + 1e-20 if rule.norm_topk_prob else 1.0
    return ids, [float(scores[i]) / total * rule.routed_scaling_factor for i in ids], margin


def combine(out: Array, weights: Array, shared: Array) -> Judged:
    terms = np.concatenate((out * weights[:, :, None], shared[:, None]), axis=1)
    return Judged(terms.sum(axis=1), np.sqrt(np.square(terms).sum(axis=1)))


def attention(
    q_nope: Array, q_rope: Array, segments: list[tuple[int, int, Array]], kv_b: Array, scale: float
) -> Judged:
    """MLA in its unabsorbed form: keys and values of every head are made from the latents. DeepSeek-V2, section 2.1."""
    heads, nope = q_nope.shape[1:]
    rank = kv_b.shape[1]
    per_head = kv_b.reshape(heads, -1, rank)
    out = np.zeros((len(q_nope), heads, per_head.shape[1] - nope))
    magnitude = np.zeros_like(out)
    for start, stop, latent in segments:
        made = np.einsum("hdr,nr->hnd", per_head, latent[:, :rank])
        for row in range(start, stop):
            seen = len(latent) - (stop - start) + row - start + 1
            keys, values = made[:, :seen, :nope], made[:, :seen, nope:]
            scores = np.einsum("hd,hnd->hn", q_nope[row], keys) + q_rope[row] @ latent[:seen, rank:].T
            scores = scores * scale
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p = p / p.sum(axis=1, keepdims=True)
            out[row] = np.einsum("hn,hnd->hd", p, values)
            magnitude[row] = np.sqrt(np.einsum("hn,hnd->hd", p, np.square(values)))
    return Judged(out, magnitude)


def relative_error(found: torch.Tensor, expected: Judged) -> float:
    """The largest error of a row, by norms over the row: |found - value| / |magnitude|. Infinite for another shape or
    dtype, for NaN, and for anything but zero where nothing but zeros was summed."""
    if found.dtype != torch.float32 or tuple(found.shape) != expected.value.shape:
        return float("inf")
    rows = found.shape[0]
    if not found.numel():
        return 0.0
    wrong = np.linalg.norm((exact(found) - expected.value).reshape(rows, -1), axis=1)
    size = np.linalg.norm(expected.magnitude.reshape(rows, -1), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(size > 0, wrong / size, np.where(wrong == 0, 0.0, np.inf))
    return float("inf") if np.isnan(errors).any() else float(errors.max())
