"""A whole MoE block, router to weighted sum, against ONNX Runtime's QMoE operator: one kernel, written by others.

Its schema: onnxruntime, docs/ContribOperators.md, com.microsoft.QMoE. router_probs choose, router_weights (input 14)
weigh; fc1 holds gate and up in alternate rows (swiglu_fusion 1).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from k2lite.backends.base import Assignment, Backend, RoutingRule
from k2lite.backends.registry import open_backend
from k2lite.quant.formats import PACKED_INT, format_named
from k2lite.quant.types import ExpertWeights, QuantTensor
from k2lite.testing.samples import expert

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

EXPERTS, ACTIVE, HIDDEN, WIDTH, TOKENS = 12, 3, 128, 128, 10
SCALING = 2.5


def qmoe(format: str, *, normalize: bool) -> object:
    """A session of one QMoE node whose inputs are all given with each call."""
    from onnx import TensorProto, helper

    bits, group = PACKED_INT[format]
    names = ["x", "probs", "fc1", "s1", "", "fc2", "s2", *[""] * 7, "weights"]
    node = helper.make_node(
        "QMoE", names, ["y"], domain="com.microsoft", k=ACTIVE, activation_type="swiglu", activation_alpha=1.0,
        activation_beta=0.0, swiglu_fusion=1, normalize_routing_weights=int(normalize), expert_weight_bits=bits,
        block_size=group,
    )  # fmt: skip
    kinds = {"fc1": TensorProto.UINT8, "fc2": TensorProto.UINT8}
    shapes = {
        "x": [TOKENS, HIDDEN],
        "probs": [TOKENS, EXPERTS],
        "fc1": [EXPERTS, 2 * WIDTH, HIDDEN * bits // 8],
        "s1": [EXPERTS, 2 * WIDTH, HIDDEN // (group or 1)],
        "fc2": [EXPERTS, HIDDEN, WIDTH * bits // 8],
        "s2": [EXPERTS, HIDDEN, WIDTH // (group or 1)],
        "weights": [TOKENS, EXPERTS],
    }
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape) for name, shape in shapes.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [TOKENS, HIDDEN])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "moe", inputs, [output])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def stacked(experts: list[ExpertWeights]) -> dict[str, np.ndarray]:
    def codes(weight: QuantTensor) -> np.ndarray:
        return weight.parts["weight_packed"].view(torch.uint8).numpy()

    def scales(weight: QuantTensor) -> np.ndarray:
        return weight.parts["weight_scale"].float().numpy()

    def alternate(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.stack((gate, up), axis=1).reshape(2 * len(gate), -1)

    return {
        "fc1": np.stack([alternate(codes(e.gate_proj), codes(e.up_proj)) for e in experts]),
        "s1": np.stack([alternate(scales(e.gate_proj), scales(e.up_proj)) for e in experts]),
        "fc2": np.stack([codes(e.down_proj) for e in experts]),
        "s2": np.stack([scales(e.down_proj) for e in experts]),
    }


def block(backend: Backend, x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor, rule: RoutingRule,
          experts: list[ExpertWeights]) -> torch.Tensor:  # fmt: skip
    weight = QuantTensor(format_named("f32"), tuple(router.shape), {"weight": router})
    ids, weights = backend.router(x, weight, bias, rule)
    out = torch.empty(TOKENS, ACTIVE, HIDDEN)
    work = [Assignment(e, *torch.where(ids == number)) for number, e in enumerate(experts)]
    backend.expert_ffn(x, work, out).wait()
    return backend.combine(out, weights, torch.zeros_like(x))


@pytest.mark.parametrize("format", ["int4_g32", "int4_g128", "int8_g128"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["reference", "onnx"])
def test_a_block_is_what_qmoe_gives(name: str, format: str, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    router = torch.randn(EXPERTS, HIDDEN, generator=generator) * HIDDEN**-0.5
    bias = 0.3 * torch.randn(EXPERTS, generator=generator)
    experts = [expert(100 + 3 * number, (format, format, format), HIDDEN, WIDTH) for number in range(EXPERTS)]
    scores = torch.sigmoid(x @ router.T)
    scaling = 1.0 if normalize else SCALING
    feed = {"x": x, "probs": scores + bias, "weights": scores * scaling}
    session = qmoe(format, normalize=normalize)
    (expected,) = session.run(None, {**{key: value.numpy() for key, value in feed.items()}, **stacked(experts)})  # type: ignore[attr-defined]
    rule = RoutingRule(ACTIVE, 1, 1, normalize, scaling)
    found = block(open_backend(name), x, router, bias, rule, experts)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
