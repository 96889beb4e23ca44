"""Error-compensated rounding of a matrix: GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1).

Columns are rounded one after another, and what each one loses is made good by changing those that are not rounded yet,
so that the output changes least on inputs with this Hessian. A group's scale is found when its first column is
reached, from the weights as changed until then. Rows don't depend on one another and sums run in one order, so neither
the number of threads nor the block of rows changes a bit.
Shapes: R rows, C columns.
"""

from __future__ import annotations

import numpy as np
import torch

from .compiling import kernel
from .errors import CheckpointError
from .formats import ScaleSearch
from .packed_int import PackedInt, pack

# Added to the diagonal, as a share of its mean: the paper's value.
DAMPING = 0.01


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian float64 [C, C], which is overwritten. float32
    [C, C]: row j, divided by its diagonal, says how the columns after j make good for column j. All zeros count as no
    knowledge: the identity."""
    mean = float(hessian.diagonal().mean())
    if not np.isfinite(mean) or mean < 0:
        raise CheckpointError("the Hessian of its inputs holds NaN, infinity or a negative square")
    hessian.diagonal().add_(damping * mean if mean else 1.0)
    lower = torch.linalg.cholesky(hessian)
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor.to(torch.float32)


def compensated(
    target: PackedInt,
    weight: torch.Tensor,
    factor: torch.Tensor,
    scale_search: ScaleSearch,
    importance: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Stored tensors of weight float32 [R, C], which is not changed, with `inverse_factor`'s factor [C, C]. Scales are
    found by `scale_search`, with `importance` float32 [C] if it is "mse"."""
    rows, columns = weight.shape
    size = target.group_size or columns
    target.demand_importance(scale_search, importance, columns)
    values = weight.to(torch.float32).clone(memory_format=torch.contiguous_format)
    codes = torch.empty(rows, columns)
    scales = torch.empty(rows, columns // size, dtype=torch.bfloat16)
    lowest = target.lowest_code(scale_search)
    for group in range(columns // size):
        span = slice(group * size, (group + 1) * size)
        weights = None if importance is None else importance[None, span].to(torch.float32)
        scales[:, group : group + 1] = target.scales(values[:, None, span], scale_search, weights)
        scale = scales[:, group].to(torch.float32).numpy()
        _round_group(
            values.numpy(), factor.numpy(), scale, span.start, span.stop, lowest, target.max_code, codes.numpy()
        )
    shape = torch.tensor((rows, columns), dtype=torch.int32)
    return {"weight_packed": pack(codes, target.bits), "weight_scale": scales, "weight_shape": shape}


@kernel
def _round_group(
    values: np.ndarray, factor: np.ndarray, scales: np.ndarray, begin: int, end: int, lowest: int, highest: int,
    codes: np.ndarray,
) -> None:  # fmt: skip
    """Round columns [begin, end) of `values` to `codes` and change all columns after each. Row by row, so that the
    factor's rows of this group stay in a processor's cache."""
    columns = values.shape[1]
    for row in range(values.shape[0]):
        scale = scales[row]
        for column in range(begin, end):
            code = min(max(np.rint(values[row, column] / scale), np.float32(lowest)), np.float32(highest))
            codes[row, column] = code
            lost = (values[row, column] - code * scale) / factor[column, column]
            for later in range(column + 1, columns):
                values[row, later] -= lost * factor[column, later]
