"""The Cambricon backend on the stand-in: the suite, prompts in groups by both ways, the demo's answer, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.backends.base import Assignment
from k2lite.backends.cambricon import spec
from k2lite.backends.cambricon.adapter import Operations
from k2lite.backends.cambricon.backend import DECODE_TOKENS, CambriconBackend
from k2lite.backends.cambricon.layout import CODES, SCALES, signed
from k2lite.backends.cambricon.spec import Prefill
from k2lite.errors import BackendError
from k2lite.testing import oracle
from k2lite.testing.samples import corner_matrix, expert, normal, packed
from k2lite.testing.suite import run_suite
from tests.backends.plain_runtime import PlainRuntime

from . import emulator

QUESTION = "How many centimeters are 12 meters?"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    emulator.calls.clear()
    yield
    torch.set_num_threads(before)


def backend(version: str = "1.3.2", prefill: Prefill = "dequantized") -> CambriconBackend:
    return CambriconBackend(PlainRuntime(), Operations(emulator.stand_in(version)), prefill=prefill)


def test_it_passes_the_suite() -> None:
    report = run_suite(backend())
    assert [case for case in report.cases if not case.passed] == []


def test_it_answers_as_the_demo_does(demo_with: Callable[[str], Path]) -> None:
    """The prompt in groups, the answer token by token."""
    engine = k2lite.load(demo_with("int4_g64"), backend=backend(), host_backend="reference", context=128)
    prompt = engine.tokenizer.render([{"role": "user", "content": QUESTION}])
    assert len(prompt.ids) > DECODE_TOKENS
    answer = list(engine.generate(prompt.ids, max_tokens=5, temperature=0))
    assert engine.tokenizer.decode(answer).startswith("1200 centi")
    assert emulator.calls["group_gemm"]
    assert emulator.calls["weight_only_quant_matmul"]


def test_groups_of_32_are_refused_with_the_recipe(demo_with: Callable[[str], Path]) -> None:
    with pytest.raises(BackendError, match=r"cambricon can't multiply int4_g32; .*quantize .* --experts int4_g64"):
        k2lite.load(demo_with("int4_g32"), backend=backend(), host_backend="reference")


@pytest.mark.parametrize("name", ["int4_g64", "int4_g128", "int8_g128", "int8_channel"])
def test_codes_are_signed_in_their_places(name: str) -> None:
    stored = corner_matrix(7, name, 24, 256)
    found = signed(stored)
    codes = emulator._nibbles(found.parts[CODES]) if name.startswith("int4") else found.parts[CODES].float()
    scales = found.parts[SCALES].float().view(24, -1)
    values = codes * scales.repeat_interleave(256 // scales.shape[1], 1)
    assert (oracle.weight_values(stored) == values.double().numpy()).all()
    assert torch.equal(found.dequantize(), stored.dequantize())


@pytest.mark.parametrize(
    ("name", "prefill", "operation", "bound"),
    [
        ("int4_g64", "dequantized", "group_gemm", 1.5e-2),
        ("int4_g64", "w4a8", "group_gemm", 1.5e-2),
        ("int4_g128", "dequantized", "group_gemm", 1.5e-2),
        ("int4_g128", "w4a8", "smooth_quant_group_gemm", 4e-2),
        ("int8_channel", "w4a8", "group_gemm", 1.5e-2),
        ("bf16", "dequantized", "group_gemm", 1.5e-2),
    ],
)
def test_a_prompt_multiplies_in_groups(name: str, prefill: Prefill, operation: str, bound: float) -> None:
    """Ten experts, so two groups; against float64."""
    there, tokens = backend(prefill=prefill), 24
    sources = [expert(200 + 3 * number, (name, name, name), 256, 128) for number in range(10)]
    x = normal(230, tokens, 256)
    owner = torch.arange(tokens * 2).view(tokens, 2) * 7 % 10
    out = torch.zeros(tokens, 2, 256)
    work = [Assignment(packed(there, source), *torch.where(owner == n)) for n, source in enumerate(sources)]
    there.expert_ffn(x, work, out).wait()
    assert emulator.calls == {operation: 6}
    for number, source in enumerate(sources):
        rows, slots = torch.where(owner == number)
        expected = oracle.mlp(oracle.exact(x)[rows.numpy()], source)
        assert oracle.relative_error(out[rows, slots], expected) < bound


def test_the_list_says_what_is_missing_and_never_more_than_emulated() -> None:
    found = spec.spec()
    assert found.probe().reason == "the package torch_mlu is not installed" or found.probe().error is not None
    assert found.evidence_text() == "emulated; not run on hardware"
    assert not {"int4_g32", "fp8_e4m3_b128"} & (
        found.capabilities.formats | found.capabilities.formats_of(experts=True)
    )
