"""The conformance suite on the kernels in Triton's interpreter: a few cases of every operation, all with --soak."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from k2lite.testing.case import Case
from k2lite.testing.suite import conformance_cases
from tests.backends.cuda.interpreted import InterpretedBackend

SOME = {
    "linear: int4_g32, every code",
    "linear: int4_g64 [5, 192]",
    "linear: int4_g128 [5, 384]",
    "linear: int8_g128, every code",
    "linear: int8_channel [5, 12]",
    "linear: fp8_e4m3_b128, every code",
    "linear: bf16 [40, 640]",
    "linear: f32 [5, 3]",
    "linear: int4_g32, no tokens",
    "mlp: int8_channel",
    "expert_ffn: no work",
    "rms_norm: [9, 512]",
    "rms_norm: [0, 64]",
    "rope: [7, 4, 64]",
    "router: groups, negative scores",
    "router: not normalized",
    "router: groups, negative scores, ties",
    "router: scores that vanish",
    "combine: [6, 8, 256]",
    "attention: decode",
    "attention: kv_b fp8_e4m3_b128",
}


@pytest.mark.parametrize("case", conformance_cases(), ids=str)
@torch.inference_mode()
def test_the_suite_passes_in_the_interpreter(case: Case, soak: bool) -> None:
    if str(case) not in SOME and not soak:
        pytest.skip("with --soak")
    case.run(InterpretedBackend())


def test_the_few_are_cases_of_the_suite() -> None:
    assert {str(case) for case in conformance_cases()} >= SOME
