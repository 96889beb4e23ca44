"""Whether the scales of routed experts belong to their codes.

A quantizer chose a group's scale so that its largest weight just fits: a group with one large weight among small ones
got a large scale and small codes. So the logarithms of a group's scale and of the size of its codes fall together where
scales and codes belong together, and don't where a scale came from elsewhere. Reads a few experts, multiplies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.types import PROJECTIONS, ExpertKey, QuantTensor

# Of a layer as many experts are read as have so many groups, and of all layers so many.
GROUPS, LAYERS = 512, 8
BLOCK = 128


def scale_agreement(checkpoint: Checkpoint) -> dict[str, dict[str, float | int]]:
    """For each projection that is stored with scales, over a few layers: the highest correlation of the logarithms of
    scale and size of codes (-1 to 0 where they belong together), the layer that has it, and the groups it is of. NaN
    where all scales of a layer are equal."""
    layers = checkpoint.schema.expert_layers
    found: dict[str, dict[str, float | int]] = {}
    for layer in layers[:: max(1, -(-len(layers) // LAYERS))]:
        for projection, pairs in _groups(checkpoint, layer).items():
            value = float(torch.corrcoef(pairs)[0, 1]) if pairs.shape[1] > 2 else float("nan")
            before = found.get(projection)
            if before is None or (not math.isnan(before["correlation"]) and not value <= before["correlation"]):
                found[projection] = {"correlation": value, "layer": layer, "groups": pairs.shape[1]}
    return found


def _groups(checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """Of each projection the logarithms of scales and sizes of codes, float64 [2, groups]."""
    parts: dict[str, list[torch.Tensor]] = {}
    for weights in _experts(checkpoint, layer):
        for projection, weight in zip(PROJECTIONS, weights, strict=True):
            pairs = logarithms(weight)
            if pairs is not None:
                parts.setdefault(projection, []).append(pairs)
        if not parts or min(sum(pairs.shape[1] for pairs in mine) for mine in parts.values()) >= GROUPS:
            break
    return {projection: torch.cat(mine, dim=1) for projection, mine in parts.items()}


def _experts(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[QuantTensor, ...]]:
    for expert in range(checkpoint.schema.n_routed_experts):
        layout = checkpoint.expert(ExpertKey(layer, expert))
        yield expert_weights(layout, read_extents(layout))


def logarithms(weight: QuantTensor) -> torch.Tensor | None:
    """Of one matrix, without groups of zeros; None where it has no scales."""
    scale = next((part for name, part in weight.parts.items() if name.startswith("weight_scale")), None)
    if scale is None:
        return None
    rows, columns = weight.shape
    height = 1 if scale.shape[0] == rows else BLOCK
    width = columns // scale.shape[1] if height == 1 else BLOCK
    square = weight.dequantize().square()
    square = pad(square, (0, -columns % width, 0, -rows % height))
    sums = square.view(scale.shape[0], height, scale.shape[1], width).double().sum(dim=(1, 3))
    counts = torch.outer(_sizes(rows, height), _sizes(columns, width))
    sizes = (sums / counts).sqrt().flatten()
    scales = scale.double().abs().flatten()
    there = (sizes > 0) & (scales > 0) & sizes.isfinite() & scales.isfinite()
    return torch.stack((scales[there].log(), (sizes[there] / scales[there]).log()))


def _sizes(length: int, step: int) -> torch.Tensor:
    """How much of `length` lies in each step."""
    return torch.tensor([min(step, length - at) for at in range(0, length, step)], dtype=torch.float64)
