"""Every call of torch_mlu_ops, bound by the signature that is found: versions differ in names and order.

Invariant: a call that does not fit the installed version is an error before anything runs, naming the operation, the
parameter and the version, never a value in the wrong place. Weights are [out, in], and their transpose multiplies.
Shapes: M rows, K inputs, N outputs, G groups of inputs, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from k2lite.quant.errors import BackendError

from .signatures import ALIASES, SIGNATURES

WEIGHT_ONLY_GROUPS = (64, 128, 256, 512)
GROUP_GEMM_GROUPS = (128, 256, 512, 1024)


class Operations:
    """`module` is torch_mlu_ops, or what stands in for it."""

    def __init__(self, module: ModuleType) -> None:
        self._version = f"torch_mlu_ops {getattr(module, '__version__', 'of unknown version')}"
        self._bound = {name: self._signed(module, name) for name in SIGNATURES}

    def weight_only_matmul(self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        """x bf16 [M, K] times codes int8 [N, K] or [N, K / 2] (the low nibble is the even input, two's complement);
        scale float32 [N], or bf16 [N, G] in groups of 64, 128, 256 or 512. Returns bf16 [M, N]."""
        return self._call("weight_only_quant_matmul", a=x, b=codes, scale=scale, quant_bit_size=bits)

    def group_gemm(self, x: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """x bf16 [M, K], counts[e] rows in turn, times weights bf16 [E, N, K]: bf16 [M, N]."""
        return self._call("group_gemm", a=x, b=weights, **_groups(x, counts))

    def w4a8_group_gemm(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        counts: Sequence[int],
    ) -> torch.Tensor:
        """x int8 [M, K] with x_scale float32 [M], times codes int8 [E, N, K / 2] with scale float32 [G, E, N] in groups
        of 128, 256, 512 or 1024: bf16 [M, N]."""
        return self._call(
            "smooth_quant_group_gemm",
            a=x, b=codes, a_scale=x_scale, b_scale=scale, dtype=torch.bfloat16, **_groups(x, counts),
        )  # fmt: skip

    def _signed(self, module: ModuleType, name: str) -> tuple[Callable[..., Any], dict[str, str]]:
        """The operation and what it calls each parameter that k2lite has a value for."""
        operation = getattr(module, name, None)
        if operation is None:
            raise BackendError(f"{self._version} has no {name}")
        found = inspect.signature(operation).parameters
        names = {}
        for ours in USED[name]:
            theirs = [alias for alias in ALIASES.get(ours, (ours,)) if alias in found]
            if not theirs:
                raise BackendError(f"{self._version}: {name} has no parameter {ours}; it takes {', '.join(found)}")
            names[ours] = theirs[0]
        unknown = [p.name for p in found.values() if p.default is p.empty and p.name not in names.values()]
        if unknown:
            raise BackendError(f"{self._version}: {name} wants {', '.join(unknown)}, which k2lite does not know")
        return operation, names

    def _call(self, name: str, **values: Any) -> torch.Tensor:
        operation, names = self._bound[name]
        result: torch.Tensor = operation(**{names[ours]: value for ours, value in values.items()})
        return result


_PLAIN = ("expand_idx", "c", "alpha", "beta")
# Every parameter that k2lite gives an operation.
USED = {
    "weight_only_quant_matmul": ("a", "b", "scale", "quant_bit_size"),
    "group_gemm": ("a", "b", "m_list", "max_m", *_PLAIN),
    "smooth_quant_group_gemm": ("a", "b", "m_list", "max_m", "a_scale", "b_scale", "dtype", *_PLAIN),
}


def _groups(x: torch.Tensor, counts: Sequence[int]) -> dict[str, Any]:
    m_list = torch.tensor(counts, dtype=torch.int32).to(x.device)
    return {"m_list": m_list, "max_m": max(counts), **dict.fromkeys(_PLAIN)}
