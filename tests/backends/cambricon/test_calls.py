"""Calls bound by signature for every version that is known, calls that no version takes, and rules of the manual."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from k2lite.backends.cambricon.adapter import Operations
from k2lite.backends.cambricon.signatures import SIGNATURES, SOURCES, signature
from k2lite.errors import BackendError

from . import emulator
from .emulator import RuleError

BF16 = torch.bfloat16
M, K, N, E = 6, 256, 32, 3


@pytest.mark.parametrize("version", SOURCES)
def test_every_known_version_is_called_by_its_own_names(version: str) -> None:
    """The stand-in binds each call against the version's signature."""
    found = Operations(emulator.stand_in(version))
    x = torch.randn(M, K).to(BF16)
    found.weight_only_matmul(x, torch.zeros(N, K, dtype=torch.int8), torch.ones(N), 8)
    weights = torch.randn(E, N, K).to(BF16)
    y = found.group_gemm(x, weights, [1, 3, 2])
    torch.testing.assert_close(y[1:4].float(), x[1:4].float() @ weights[1].float().T, rtol=1e-2, atol=0.1)
    codes, scale = torch.ones(E, N, K // 2, dtype=torch.int8), torch.ones(2, E, N)
    found.w4a8_group_gemm(x.to(torch.int8), torch.ones(M), codes, scale, [1, 3, 2])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(a, b, m_list, expand_idx, c, alpha, beta, max_m, bias=None, tile=None)", None),
        ("(b, a, beta, alpha, c, expand_idx, max_m, m_list)", None),  # by name: the order is of no account
        ("(a, b, m_list, expand_idx, c, alpha, beta)", "group_gemm has no parameter max_m; it takes a, b"),
        ("(a, b, m_list, c, alpha, beta, max_m)", "group_gemm has no parameter expand_idx"),
        ("(a, b, m_list, expand_idx, c, alpha, beta, max_m, output)", "group_gemm wants output, which k2lite does not"),
    ],
)
def test_another_signature_is_bound_or_refused(text: str, said: str | None) -> None:
    module = emulator.stand_in("1.3.2")
    declared = signature(text)

    def other(**given: Any) -> torch.Tensor:
        declared.bind(**given)
        return given["a"]  # type: ignore[no-any-return]

    other.__signature__ = declared  # type: ignore[attr-defined]
    module.group_gemm = other  # type: ignore[attr-defined]
    if said is None:
        Operations(module).group_gemm(torch.ones(2, 4), torch.ones(1, 3, 4), [2])
    else:
        with pytest.raises(BackendError, match=said):
            Operations(module)


def test_a_library_without_an_operation_is_refused() -> None:
    with pytest.raises(BackendError, match="torch_mlu_ops of unknown version has no weight_only_quant_matmul"):
        Operations(ModuleType("torch_mlu_ops"))


def test_every_signature_has_a_source() -> None:
    assert {version for versions in SIGNATURES.values() for version in versions} <= set(SOURCES)


def weight_only() -> dict[str, Any]:
    return {
        "a": torch.randn(M, K).to(BF16),
        "b": torch.zeros(N, K // 2, dtype=torch.int8),
        "scale": torch.ones(N, K // 64).to(BF16),
        "quant_bit_size": 4,
    }


def gemm() -> dict[str, Any]:
    return {
        "a": torch.randn(M, K).to(BF16),
        "b": torch.randn(E, N, K).to(BF16),
        "m_list": torch.tensor([1, 3, 2], dtype=torch.int32),
        "max_m": 3,
        **dict.fromkeys(("expand_idx", "c", "alpha", "beta")),
    }


def w4a8() -> dict[str, Any]:
    codes = torch.zeros(E, N, K // 2, dtype=torch.int8)
    more = {"a_scale": torch.ones(M), "b_scale": torch.ones(K // 128, E, N), "dtype": BF16}
    return {**gemm(), "a": torch.zeros(M, K, dtype=torch.int8), "b": codes, **more}


RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    "weight_only_quant_matmul": weight_only,
    "group_gemm": gemm,
    "smooth_quant_group_gemm": w4a8,
}
WEIGHT_ONLY, GEMM, W4A8 = RIGHT
WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    (WEIGHT_ONLY, "K2's groups of 32", {"scale": torch.ones(N, K // 32).to(BF16)}, "64, 128, 256 or 512"),
    (WEIGHT_ONLY, "a zero point", {"zero": torch.zeros(N)}, "zero must be None"),
    (WEIGHT_ONLY, "float32", {"a": torch.randn(M, K)}, "a must be half"),
    (WEIGHT_ONLY, "bytes", {"b": torch.zeros(N, K // 2, dtype=torch.uint8)}, "b must be int8"),
    (WEIGHT_ONLY, "unpacked", {"b": torch.zeros(N, K, dtype=torch.int8)}, "K of b"),
    (WEIGHT_ONLY, "along outputs", {"b": torch.zeros(K, N // 2, dtype=torch.int8)}, "K of b"),
    (WEIGHT_ONLY, "float32 group scales", {"scale": torch.ones(N, K // 64)}, "must have a's dtype"),
    (WEIGHT_ONLY, "BF16 row scales", {"scale": torch.ones(N).to(BF16)}, "channel must be float32"),
    (WEIGHT_ONLY, "scales [G, N]", {"scale": torch.ones(K // 64, N).to(BF16)}, "[N, G]"),
    (WEIGHT_ONLY, "an activation", {"act_mode": "silu"}, "act_mode none"),
    (WEIGHT_ONLY, "5 bits", {"quant_bit_size": 5}, "4 or 8"),
    (WEIGHT_ONLY, "another name", {"bits": 4}, "unexpected"),
    (GEMM, "integer weights", {"b": torch.zeros(E, N, K, dtype=torch.int8)}, "b must have a's dtype"),
    (GEMM, "weights [E, K, N]", {"b": torch.randn(E, K, N).to(BF16)}, "K of b"),
    (GEMM, "counts in int64", {"m_list": torch.tensor([1, 3, 2])}, "m_list must be int32"),
    (GEMM, "a row too few", {"m_list": torch.tensor([1, 3, 1], dtype=torch.int32)}, "add up"),
    (GEMM, "the mean for the most", {"max_m": 2}, "max_m must be"),
    (GEMM, "a strided x", {"a": torch.randn(M, 2 * K).to(BF16)[:, ::2]}, "contiguous"),
    (W4A8, "scales [E, N, G]", {"b_scale": torch.ones(E, N, K // 128)}, "b_scale must be [G, E, n]"),
    (W4A8, "groups of 64", {"b_scale": torch.ones(K // 64, E, N)}, "128, 256, 512 or 1024"),
    (W4A8, "BF16 scales", {"b_scale": torch.ones(K // 128, E, N).to(BF16)}, "b_scale must be float32"),
    (W4A8, "one scale for x", {"a_scale": torch.ones(1)}, "a_scale must be"),
    (W4A8, "BF16 x", {"a": torch.zeros(M, K).to(BF16)}, "a and b must be int8"),
    (W4A8, "float32 out", {"dtype": torch.float32}, "dtype must be half"),
]  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_call_passes(name: str) -> None:
    getattr(emulator.stand_in("1.3.2"), name)(**RIGHT[name]())


@pytest.mark.parametrize(
    ("name", "change", "rule"), [pytest.param(n, c, r, id=f"{n}: {what}") for n, what, c, r in WRONG]
)
def test_a_wrong_call_is_seen(name: str, change: dict[str, Any], rule: str) -> None:
    with pytest.raises((RuleError, TypeError)) as caught:
        getattr(emulator.stand_in("1.3.2"), name)(**{**RIGHT[name](), **change})
    assert rule in str(caught.value)
