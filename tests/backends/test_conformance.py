"""The suite on our own backends, and the suite itself: each way to be wrong that is planted here, it sees.

Rounding errors of a right backend stay far below the bounds, so that a bound is a statement and no excuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from k2lite.backends.base import (
    DONE,
    Assignment,
    Capabilities,
    Event,
    Memory,
    Numerics,
    RoutingRule,
    Segment,
    causal_rows,
)
from k2lite.backends.fallback import FallbackBackend
from k2lite.backends.reference import ReferenceBackend
from k2lite.backends.registry import open_backend
from k2lite.quant.formats import FORMAT_NAMES
from k2lite.quant.types import ExpertWeights, QuantTensor
from k2lite.testing.case import Case
from k2lite.testing.report import CaseResult, make_report
from k2lite.testing.suite import conformance_cases, run_suite


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The suite's tensors are small: threads that wait for one another take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["reference", "onnx"])
def test_our_backends_pass(name: str) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    backend = open_backend(name)
    report = run_suite(backend)
    assert [case for case in report.cases if not case.passed] == []
    numerics = backend.capabilities().numerics
    for case in report.cases:
        if case.error is not None and case.operation in ("linear", "rms_norm", "rope", "combine"):
            assert case.error < numerics.linear_error, case
    described = json.loads(report.as_json())
    assert described == report.as_dict()
    assert described["passed"] is True
    operations = {case.operation for case in report.cases}
    assert operations == {str(case).split(":")[0] for case in conformance_cases()}
    claimed = backend.capabilities().formats
    for format in FORMAT_NAMES:
        assert any(format in case.case for case in report.cases if case.operation == "linear") == (format in claimed)


class Wrong(ReferenceBackend):
    """Right until a test plants something."""


def planted(**methods: Callable[..., object]) -> ReferenceBackend:
    return type("Planted", (Wrong,), methods)()


@cache
def cases_of(operation: str) -> list[Case]:
    return [case for case in conformance_cases() if case.operation == operation]


def failures(backend: ReferenceBackend, operation: str) -> list[CaseResult]:
    """Up to the first that fails."""
    for case in cases_of(operation):
        result = case.result(backend)
        if not result.passed:
            return [result]
    return []


def other_linear(change: Callable[[torch.Tensor, QuantTensor], torch.Tensor]) -> ReferenceBackend:
    def linear(self: ReferenceBackend, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return change(ReferenceBackend.linear(self, x, weight), weight)

    return planted(linear=linear)


def swapped_nibbles(self: ReferenceBackend, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    parts = dict(weight.parts)
    if "weight_packed" in parts and weight.format.name.startswith("int4"):
        codes = parts["weight_packed"].contiguous().view(torch.uint8)
        parts["weight_packed"] = (codes >> 4 | codes << 4).view(torch.int32)
    return ReferenceBackend.linear(self, x, QuantTensor(weight.format, weight.shape, parts))


def positive_scales(self: ReferenceBackend, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    parts = {suffix: part.abs() if suffix == "weight_scale" else part for suffix, part in weight.parts.items()}
    return ReferenceBackend.linear(self, x, QuantTensor(weight.format, weight.shape, parts))


def lowest_code_lost(self: ReferenceBackend, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """-8 read as -7, as kernels do that clamp to Moonshot's grid."""
    parts = dict(weight.parts)
    if weight.format.name.startswith("int4"):
        codes = parts["weight_packed"].contiguous().view(torch.uint8).clone()
        codes[codes & 0xF == 0] |= 1
        parts["weight_packed"] = codes.view(torch.int32)
    return ReferenceBackend.linear(self, x, QuantTensor(weight.format, weight.shape, parts))


def half_activations(self: ReferenceBackend, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    return ReferenceBackend.linear(self, x.half().float(), weight)


def by_matrix(self: ReferenceBackend, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:  # noqa: ARG001
    return x @ weight.dequantize().T


LINEAR = {
    "nibbles swapped": swapped_nibbles,
    "scales without sign": positive_scales,
    "the lowest code lost": lowest_code_lost,
    "activations in half precision": half_activations,
    "bits that depend on the batch": by_matrix,
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_wrong_product_is_seen(name: str) -> None:
    assert failures(planted(linear=LINEAR[name]), "linear"), name


def test_edges_of_fp8_blocks_and_dtypes_are_seen() -> None:
    def first_block_everywhere(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return x * (2 if weight.format.name.startswith("fp8") and weight.shape[0] > 128 else 1)

    assert failures(other_linear(first_block_everywhere), "linear")
    assert failures(other_linear(lambda y, _: y.double()), "linear")
    assert failures(other_linear(lambda y, _: y.nan_to_num(0) + 0 * y.abs().log()), "linear")  # NaN for a row of zeros


def route(
    self: ReferenceBackend, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
) -> object:
    return ReferenceBackend.router(self, x, weight, bias, rule)


def routed(change: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> ReferenceBackend:
    def router(self: ReferenceBackend, *inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        return change(self, *inputs)

    return planted(router=router)


def with_bias_in_weights(self, x, weight, bias, rule):  # type: ignore[no-untyped-def]
    ids, weights = route(self, x, weight, bias, rule)  # type: ignore[misc]
    return ids, weights + 0.01 * bias[ids]


def highest_of_equals(self, x, weight, bias, rule):  # type: ignore[no-untyped-def]
    turned = QuantTensor(weight.format, weight.shape, {"weight": weight.parts["weight"].flip(0)})
    ids, weights = route(self, x, turned, bias.flip(0), replace(rule))  # type: ignore[misc]
    return (weight.shape[0] - 1 - ids).flip(1), weights.flip(1)


def without_groups(self, x, weight, bias, rule):  # type: ignore[no-untyped-def]
    return route(self, x, weight, bias, replace(rule, n_group=1))


def unscaled(self, x, weight, bias, rule):  # type: ignore[no-untyped-def]
    return route(self, x, weight, bias, replace(rule, routed_scaling_factor=1.0))


def always_normalized(self, x, weight, bias, rule):  # type: ignore[no-untyped-def]
    return route(self, x, weight, bias, replace(rule, norm_topk_prob=True))


def best_first(self, x, weight, bias, rule):  # type: ignore[no-untyped-def]
    ids, weights = route(self, x, weight, bias, rule)  # type: ignore[misc]
    order = weights.sort(dim=1, descending=True).indices
    return ids.gather(1, order), weights.gather(1, order)


def without_bias(self, x, weight, bias, rule):  # type: ignore[no-untyped-def]
    return route(self, x, weight, torch.zeros_like(bias), rule)


@pytest.mark.parametrize(
    "change",
    [with_bias_in_weights, highest_of_equals, without_groups, unscaled, always_normalized, best_first, without_bias],
)
def test_a_wrong_router_is_seen(change: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert failures(routed(change), "router")


def norm_without_eps(self, x, weight, eps):  # type: ignore[no-untyped-def]
    return ReferenceBackend.rms_norm(self, x, weight, 0.0 * eps)


def norm_without_weight(self, x, weight, eps):  # type: ignore[no-untyped-def]
    return ReferenceBackend.rms_norm(self, x, torch.ones_like(weight), eps)


def halves_rotated(self, x, cos, sin):  # type: ignore[no-untyped-def]  # noqa: ARG001
    cos, sin = (table.view(len(x), *([1] * (x.dim() - 2)), -1) for table in (cos, sin))
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)


def sum_without_shared(self, out, weights, shared):  # type: ignore[no-untyped-def]
    return ReferenceBackend.combine(self, out, weights, torch.zeros_like(shared))


def gelu(self, x, weights):  # type: ignore[no-untyped-def]
    h = torch.nn.functional.gelu(self.linear(x, weights.gate_proj)) * self.linear(x, weights.up_proj)
    return self.linear(h, weights.down_proj)


def gate_and_up_swapped(self, x, weights):  # type: ignore[no-untyped-def]
    return ReferenceBackend.mlp(self, x, ExpertWeights(weights.up_proj, weights.gate_proj, weights.down_proj))


def wrong_slots(self, x, work, out):  # type: ignore[no-untyped-def]
    for item in work:
        out[item.rows] = self.mlp(x[item.rows], item.expert)[:, None]
    return DONE


def adds_to_what_is_there(self, x, work, out):  # type: ignore[no-untyped-def]
    for item in work:
        out[item.rows, item.slots] += self.mlp(x[item.rows], item.expert)
    return DONE


def sums_in_order_of_work(self, x, work: Sequence[Assignment], out) -> Event:  # type: ignore[no-untyped-def]
    for number, item in enumerate(work):
        out[item.rows, item.slots] = self.mlp(x[item.rows], item.expert) * (1 + number * 1e-7)
    return DONE


def sees_all(self, q_nope, q_rope, segments, kv_b, scale):  # type: ignore[no-untyped-def]
    wide = [Segment(row, row + 1, segment.latent) for segment in segments for row in range(segment.start, segment.stop)]
    return ReferenceBackend.attention(self, q_nope, q_rope, wide, kv_b, scale)


def misses_itself(self, q_nope, q_rope, segments, kv_b, scale):  # type: ignore[no-untyped-def]
    rows = causal_rows(segments)
    short = [Segment(row, row + 1, latent[:-1] if len(latent) > 1 else latent) for row, latent in rows]
    return ReferenceBackend.attention(self, q_nope, q_rope, short, kv_b, scale)


def without_rotary(self, q_nope, q_rope, segments, kv_b, scale):  # type: ignore[no-untyped-def]
    return ReferenceBackend.attention(self, q_nope, 0 * q_rope, segments, kv_b, scale)


def unscaled_attention(self, q_nope, q_rope, segments, kv_b, scale):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return ReferenceBackend.attention(self, q_nope, q_rope, segments, kv_b, 1.0)


def copies_nothing(self, src, dst):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return DONE


def one_byte_off(self, nbytes):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return torch.empty(nbytes + 1, dtype=torch.uint8)[1:]


def uploads_nothing(self, tensor):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return tensor


def packs_beside_the_slot(self, src, slot):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return src


def all_free(self) -> Memory:  # type: ignore[no-untyped-def]  # noqa: ARG001
    return Memory(1 << 30, 1 << 40)


def unknown_format(self) -> Capabilities:  # type: ignore[no-untyped-def]  # noqa: ARG001
    return Capabilities(frozenset({"int3_g32"}), "a name")


OTHERS: list[tuple[str, Callable[..., object]]] = [
    ("rms_norm", norm_without_eps),
    ("rms_norm", norm_without_weight),
    ("rope", halves_rotated),
    ("combine", sum_without_shared),
    ("mlp", gelu),
    ("mlp", gate_and_up_swapped),
    ("expert_ffn", wrong_slots),
    ("expert_ffn", adds_to_what_is_there),
    ("expert_ffn", sums_in_order_of_work),
    ("attention", sees_all),
    ("attention", misses_itself),
    ("attention", without_rotary),
    ("attention", unscaled_attention),
    ("copy", copies_nothing),
    ("alloc", one_byte_off),
    ("upload", uploads_nothing),
    ("pack_expert", packs_beside_the_slot),
    ("memory", all_free),
    ("capabilities", unknown_format),
]


@pytest.mark.parametrize(("operation", "method"), OTHERS, ids=lambda value: getattr(value, "__name__", value))
def test_any_other_wrong_operation_is_seen(operation: str, method: Callable[..., object]) -> None:
    assert failures(planted(**{operation: method}), operation) or operation == "capabilities"
    if operation == "capabilities":
        assert not cases_of("capabilities")[0].result(planted(capabilities=method)).passed


def test_a_state_between_calls_is_seen_in_the_model() -> None:
    """Each operation is right alone; what an expert gave last time is what is wrong."""

    class Remembers(ReferenceBackend):
        calls = 0

        def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
            self.calls += 1
            super().expert_ffn(x, work, out)
            out *= 1 + 1e-7 * self.calls
            return DONE

    assert not cases_of("model")[0].result(Remembers()).passed


def test_wide_numerics_do_not_hide_a_wrong_model() -> None:
    class Coarse(ReferenceBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), numerics=Numerics(linear_error=1e-2, batch_invariant=False))

        def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
            return super().mlp(x, ExpertWeights(weights.up_proj, weights.gate_proj, weights.down_proj))

    model = {case.name: case for case in cases_of("model")}
    assert not model["logits"].result(Coarse()).passed
    assert not model["in chunks and beside others"].applies(Coarse().capabilities())


def test_a_report_of_an_error_without_bound_is_json() -> None:
    backend = other_linear(lambda y, _: y / 0)
    results = [case.result(backend) for case in cases_of("linear")[:3]]
    assert any(result.error == float("inf") for result in results)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    report = json.loads(make_report(backend, (), results).as_json(), parse_constant=refuse)
    assert not report["passed"]
    assert report["cases"][0]["error"] is None
    assert "error inf, and its numerics allow" in report["cases"][0]["said"]


def test_a_raised_error_is_a_failure_that_names_it() -> None:
    def fails(self: ReferenceBackend, nbytes: int) -> torch.Tensor:  # noqa: ARG001
        raise RuntimeError(f"no room for {nbytes}")

    (result,) = failures(planted(alloc=fails), "alloc")
    assert "raised RuntimeError: no room for 0 (fails, line" in result.said
    with pytest.raises(AssertionError, match="no room for 0"):
        cases_of("alloc")[0].run(planted(alloc=fails))


def test_a_backend_that_falls_back_passes_too() -> None:
    """INT4 and FP8 are plain torch's here, the rest the inner backend's; nothing shows but the lines."""

    class Few(ReferenceBackend):
        def capabilities(self) -> Capabilities:
            return Capabilities(frozenset({"bf16", "f32"}), "few", max_experts=100)

    lines: list[str] = []
    backend = FallbackBackend(Few(), lines.append)
    for operation in ("linear", "router", "expert_ffn", "pack_expert"):
        for case in cases_of(operation):
            assert case.result(backend).passed, case
    assert "backend reference: linear falls back to plain torch: no int4_g32" in lines
    assert "backend reference: router falls back to plain torch: 384 experts are more than 100" in lines
    assert len(lines) == len(set(lines))
