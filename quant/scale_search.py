"""Looks for the scales that make the smallest squared error, a group of weights at a time, all groups at once.

Codes are -8..7 or -128..127, and a scale may be negative: of a group's two ends, the one with the largest weight gets
the code that only the low end has. llama.cpp's Q4_0 does the same; no scale for codes -7..7 is as good as its rule.

Every operation is elementwise and sums run in one fixed order, so that the bits depend neither on the number of threads
nor on how many rows are given at once. Knows nothing of packing.
"""

from __future__ import annotations

import torch

# By the largest code, factors of the scale that puts the largest weight on that code. At 7/8 it has code -8, below that
# it is clipped; above, chance decides how well the other weights fall. In 8 bits clipping costs more than it gains.
FACTORS = {
    7: tuple(step / 40 for step in range(28, 43)),
    127: tuple(step / 200 for step in range(194, 210)),
}
REFINEMENTS = 2
# A gain smaller than this may be float32's rounding: it is no reason to leave a scale.
LEAST_GAIN = 1e-4


def search_scales(
    groups: torch.Tensor, amax_scales: torch.Tensor, max_code: int, importance: torch.Tensor | None
) -> torch.Tensor:
    """BF16 scales [R, G] for float32 `groups` [R, G, N] and codes up to max_code, 7 or 127: of the candidates the one
    with the smallest sum of importance * (weight - code * scale)**2, and amax_scales [R, G] where none is better.

    `importance` is [G, N], None for 1. The candidates are amax_scales times FACTORS, signed, then REFINEMENTS times the
    scale that the best codes so far would like to have, in closed form (least squares); all are rounded to BF16
    first."""
    values = groups.permute(2, 0, 1).contiguous()  # [N, R, G]: sums over the first axis run along whole rows
    weights = None if importance is None else importance.t().contiguous()[:, None, :]  # [N, 1, G]
    best = amax_scales.to(torch.float32)
    error = _error(values, best, max_code, weights)

    def keep_if_better(trial: torch.Tensor) -> None:
        nonlocal best, error
        trial = trial.to(torch.bfloat16).to(torch.float32)
        trial_error = _error(values, trial, max_code, weights)
        better = trial_error < error * (1 - LEAST_GAIN)  # false for the NaN of a scale that is 0, infinite or NaN
        better &= torch.isfinite(trial * (max_code + 1))  # near float32's limit the lowest code would be infinite
        best, error = torch.where(better, trial, best), torch.where(better, trial_error, error)

    start = torch.where(groups.amax(dim=-1) > -groups.amin(dim=-1), -best, best)
    for factor in FACTORS[max_code]:
        keep_if_better(start * factor)
    for _ in range(REFINEMENTS):
        keep_if_better(_least_squares(values, best, max_code, weights))
    return best.to(torch.bfloat16)


def _error(values: torch.Tensor, scales: torch.Tensor, max_code: int, weights: torch.Tensor | None) -> torch.Tensor:
    """The root of each group's weighted sum of squared errors, [R, G]. Summed in units of the scale, where no square
    over- or underflows."""
    steps = values / scales
    off = steps.round().clamp_(-max_code - 1, max_code).sub_(steps).square_()
    return _sum(off if weights is None else off.mul_(weights)).sqrt() * scales.abs()


def _least_squares(
    values: torch.Tensor, scales: torch.Tensor, max_code: int, weights: torch.Tensor | None
) -> torch.Tensor:
    """For the codes that `scales` give, the scales with the smallest error, [R, G]; NaN for a group of zeros."""
    steps = values / scales
    codes = steps.round().clamp_(-max_code - 1, max_code)
    weighted = codes if weights is None else codes * weights
    return scales * _sum(steps.mul_(weighted)) / _sum(codes * weighted)


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis, in halves, which overwrites `terms`."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms[:half] += terms[half : 2 * half]
        if len(terms) % 2:
            terms[0] += terms[-1]
        terms = terms[:half]
    return terms[0]
