"""The ONNX backend beyond the suite, and ONNX Runtime as an oracle of our formats: others wrote its kernels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import k2lite
from k2lite.backends.base import UnsupportedOperationError
from k2lite.backends.registry import open_backend
from k2lite.demo_checkpoint import DEMO_CONFIG, write_random_model
from k2lite.errors import BackendError
from k2lite.quant.formats import PACKED_INT, format_named
from k2lite.quant.types import ExpertWeights, QuantTensor
from k2lite.testing.samples import expert
from tests.conftest import REPO

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def matrix(format: str, rows: int, columns: int, seed: int = 0) -> tuple[QuantTensor, torch.Tensor]:
    stored = format_named(format)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    parts = stored.quantize(values, scale_search="mse")
    return QuantTensor(stored, (rows, columns), parts), stored.dequantize(parts, (rows, columns))


@pytest.mark.parametrize("format", PACKED_INT)
def test_its_kernels_read_our_packed_words_as_we_do(format: str) -> None:
    """The identity through onnxruntime's own kernel gives our dequantized weight: scales of both signs, all codes."""
    weight, values = matrix(format, 72, 256)
    found = open_backend("onnx").linear(torch.eye(256), weight)
    assert torch.equal(found, values.T)


def test_weights_are_not_copied_into_sessions() -> None:
    """A session a shape, whatever weights come."""
    backend = open_backend("onnx")
    first, second = (matrix("int4_g32", 40, 64, seed)[0] for seed in (1, 2))
    x = torch.ones(1, 64)
    before = backend.linear(x, first)
    assert not torch.equal(backend.linear(x, second), before)
    assert torch.equal(backend.linear(x, first), before)
    assert len(backend._sessions) == 1  # type: ignore[attr-defined]


def test_an_expert_is_one_graph_of_the_operators_that_are_named() -> None:
    import onnx

    from k2lite.backends.onnx.graphs import Stored, expert_graph

    wide, back = Stored(64, 128, 4, 32), Stored(128, 64, 8, None)
    model = expert_graph(wide, wide, back)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == [
        "MatMulNBits", "MatMulNBits", "Sigmoid", "Mul", "Mul", "Constant", "DequantizeLinear", "Gemm",
    ]  # fmt: skip
    assert not model.graph.initializer


def test_packed_experts_hold_the_scales_as_they_multiply() -> None:
    backend = open_backend("onnx")
    source = expert(1, ("int4_g32", "int4_g32", "int8_channel"), 128, 128)
    room = backend.expert_slot([(weight.format, weight.shape) for weight in source])
    assert room.repacked
    codes, scales = 128 * 128 // 2, 4 * 128 * 4
    assert room.nbytes == 2 * (codes + scales) + 128 * 128 + 4 * 128
    slot = backend.alloc(room.nbytes)
    packed = backend.pack_expert(source, slot)
    assert packed.gate_proj.parts["weight_scale"].dtype == torch.float32
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(backend.mlp(x, packed), backend.mlp(x, source))
    slot.zero_()
    assert not backend.mlp(x, packed).any()


def test_fp8_is_refused_by_name() -> None:
    weight, _ = (QuantTensor(format_named("fp8_e4m3_b128"), (8, 8), {}), None)
    with pytest.raises(UnsupportedOperationError, match="can't multiply fp8_e4m3_b128"):
        open_backend("onnx").linear(torch.ones(1, 8), weight)
    with pytest.raises(UnsupportedOperationError):
        open_backend("onnx").mlp(torch.ones(1, 8), ExpertWeights(weight, weight, weight))


def test_a_model_gives_the_reference_s_tokens(tmp_path: Path) -> None:
    sizes = {
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "hidden_size": 128,
        "q_lora_rank": 128,
    }
    write_random_model(tmp_path / "m", {**DEMO_CONFIG, **sizes}, experts="int4_g32", trunk="int8_channel", seed=2)
    ids = [256, 104, 105]
    engines = [k2lite.load(tmp_path / "m", backend=name, context=64) for name in ("onnx", "reference")]
    found, expected = (engine.logits(ids) for engine in engines)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    tokens = [list(map(int, engine.generate(ids, max_tokens=6, temperature=0))) for engine in engines]
    assert tokens[0] == tokens[1]
    assert engines[0].placement.packs_experts
    # packed on the way out of the cache, wherever they came from
    few = k2lite.load(tmp_path / "m", backend="onnx", context=64, resident_experts=4)
    assert torch.equal(few.logits(ids), found)


def test_the_demo_s_fp8_is_refused_with_the_recipe() -> None:
    with pytest.raises(BackendError, match="quantize .* DST --experts int4_g32 --trunk int8_channel makes a folder"):
        k2lite.load(REPO / "k2lite" / "demo", backend="onnx")


@pytest.mark.parametrize("file", ["backends/reference_report.json", "backends/onnx/report.json"])
def test_the_shipped_report_is_of_a_passed_run(file: str) -> None:
    report = json.loads((REPO / file).read_text())
    assert report["passed"] is True
    assert all(case["passed"] for case in report["cases"])
    assert report["contract"] == 1
