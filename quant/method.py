"""How a matrix's codes and scales are found: from its weights alone, or with what is known of its inputs.

`importance` and `hessians` are statistics of the inputs that a model gave its matrices on some text. Formats without
codes to choose (FP8, BF16) round to the nearest whatever is known. Knows no models and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .errors import RequestError
from .formats import PACKED_INT, ScaleSearch
from .moments import Moments
from .packed_int import PackedInt

if TYPE_CHECKING:
    from .quantization_plan import Matrix

_SHOWN = 5

Quantize = Callable[[torch.Tensor], dict[str, torch.Tensor]]


class HessianSource(Protocol):
    """Hands out one matrix's Hessian at a time, so that not all are in memory at once."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What made them, for the manifest and --resume."""

    def widths(self) -> Mapping[str, int]:
        """Columns of each matrix that has a Hessian, by module."""

    def hessian(self, module: str) -> torch.Tensor:
        """Mean of the outer products of its inputs with themselves, float64 [in, in]; the caller may overwrite it."""


@dataclass(frozen=True)
class Method:
    """Scales by `scale_search`; with `importance`, of the smallest weighted error; with `hessians`, codes are chosen so
    that later columns make good for the errors of earlier ones (GPTQ)."""

    scale_search: ScaleSearch = "amax"
    importance: Moments | None = None
    hessians: HessianSource | None = None

    def __post_init__(self) -> None:
        if self.importance is not None and self.scale_search != "mse":
            raise RequestError("--importance weighs the errors of --scale-search mse, and the search is amax: add it")
        if self.importance is not None and self.hessians is not None:
            raise RequestError("--importance and --rounding gptq: the Hessians hold the moments already; leave one out")

    @property
    def settings(self) -> dict[str, Any]:
        """What there is besides the recipe, as the manifest and the journal hold it."""
        settings: dict[str, Any] = {}
        if self.importance is not None:
            settings["importance"] = self.importance.identity
        if self.hessians is not None:
            settings |= {"rounding": "gptq", "calibration": dict(self.hessians.settings)}
        return settings

    def demand_known(self, matrices: Iterable[Matrix]) -> None:
        """Raise RequestError naming what is to be quantized and not known, or known for another shape."""
        if self.importance is not None:
            known, where = self.importance.widths(), str(self.importance.path)
        elif self.hessians is not None:
            known, where = self.hessians.widths(), "the calibration"
        else:
            return
        wanted = {m.module: m.source.shape[1] for m in to_integers(matrices)}
        missing = [name for name in wanted if name not in known]
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise RequestError(
                f"{where} has nothing for {', '.join(missing[:_SHOWN])}{more}, which {_are(missing)} to be quantized: "
                "record this model"
            )
        for name, width in wanted.items():
            if known[name] != width:
                raise RequestError(f"{where}: {name} has {known[name]} inputs there and {width} in this model")

    def quantizer(self, matrix: Matrix) -> Quantize:
        """What makes stored tensors of `matrix`'s rows, float32 [some rows, in]."""
        target = matrix.target
        if not isinstance(target, PackedInt):
            return target.quantize
        search = self.scale_search
        if self.hessians is not None:
            from .error_compensation import compensated, inverse_factor  # compiles: for those only who ask for it

            hessian = self.hessians.hessian(matrix.module)
            diagonal = hessian.diagonal().to(torch.float32).clone() if search == "mse" else None
            factor = inverse_factor(hessian)
            return lambda rows: compensated(target, rows, factor, search, diagonal)
        importance = self.importance_of(matrix)
        return lambda rows: target.quantize(rows, scale_search=search, importance=importance)

    def importance_of(self, matrix: Matrix) -> torch.Tensor | None:
        """By column, float32 [in]; None if it is not known."""
        return None if self.importance is None else self.importance.of(matrix.module)


def to_integers(matrices: Iterable[Matrix]) -> list[Matrix]:
    """Those whose codes are chosen. Raises RequestError where there is none, so that no statistics count."""
    found = [matrix for matrix in matrices if not matrix.is_kept and matrix.target.name in PACKED_INT]
    if not found:
        raise RequestError("--importance and --rounding gptq have no effect: nothing becomes INT4 or INT8")
    return found


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
