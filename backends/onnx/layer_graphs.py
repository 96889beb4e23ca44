"""The feed-forward block of one layer as ONNX nodes: routed experts as one QMoE, all else as products of graphs.py.

Invariant: a weight's name, type and shape are decided here, its values nowhere: they are inputs until the export makes
external data of them. QMoE chooses by router_probs (score + bias) and weighs by router_weights (the score, input 14);
its fc1 has gate and up in alternate rows. Knows no torch and runs nothing.
Source: onnxruntime, docs/ContribOperators.md, com.microsoft.QMoE.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto, helper
from onnx.onnx_ml_pb2 import NodeProto, ValueInfoProto

from .graphs import Stored, mlp, product, values

Block = tuple[list[NodeProto], list[ValueInfoProto]]


@dataclass(frozen=True)
class RoutedExperts:
    """E experts of one layer, codes of `bits` in blocks of inputs."""

    experts: int
    active: int
    hidden: int
    width: int
    bits: int
    block_size: int
    normalize: bool
    scaling: float


def dense_block(prefix: str, gate: Stored, up: Stored, down: Stored) -> Block:
    """From prefix + "x" [T, D], normalized hidden states, to prefix + "y" [T, D]."""
    return mlp(f"{prefix}x", f"{prefix}y", prefix, gate, up, down)


def moe_block(prefix: str, routed: RoutedExperts, shared: tuple[Stored, Stored, Stored]) -> Block:
    """The same with routed experts and the shared one. The router's weight and bias are float32."""
    x = f"{prefix}x"

    def at(name: str) -> str:
        return prefix + name

    nodes, inputs = product(x, at("logits"), at("router"), Stored(routed.experts, routed.hidden))
    bias = values(at("router.bias"), [routed.experts])
    scaling = helper.make_tensor("scaling", TensorProto.FLOAT, [], [routed.scaling])
    nodes += [
        helper.make_node("Constant", [], [at("scaling")], value=scaling),
        helper.make_node("Sigmoid", [at("logits")], [at("scores")]),
        helper.make_node("Add", [at("scores"), bias.name], [at("choice")]),
    ]
    # normalized weights are scaled behind the sum, others before it
    weights, out = ("scores", "unscaled") if routed.normalize else ("weights", "routed")
    if not routed.normalize:
        nodes.append(helper.make_node("Mul", [at("scores"), at("scaling")], [at("weights")]))
    stacks = _stacks(prefix, routed)
    names = [stack.name for stack in stacks]
    nodes.append(
        helper.make_node(
            "QMoE",
            [x, at("choice"), names[0], names[1], "", names[2], names[3], *[""] * 7, at(weights)],
            [at(out)],
            domain="com.microsoft",
            k=routed.active,
            activation_type="swiglu",
            activation_alpha=1.0,
            activation_beta=0.0,
            swiglu_fusion=1,
            normalize_routing_weights=int(routed.normalize),
            expert_weight_bits=routed.bits,
            block_size=routed.block_size,
        )
    )
    if routed.normalize:
        nodes.append(helper.make_node("Mul", [at("unscaled"), at("scaling")], [at("routed")]))
    made, wanted = mlp(x, at("shared"), at("shared_experts."), *shared)
    nodes += [*made, helper.make_node("Add", [at("routed"), at("shared")], [f"{prefix}y"])]
    return nodes, [*inputs, bias, *stacks, *wanted]


def _stacks(prefix: str, routed: RoutedExperts) -> list[ValueInfoProto]:
    """fc1 and fc2, codes and scales of each."""
    shapes = {"fc1": (2 * routed.width, routed.hidden), "fc2": (routed.hidden, routed.width)}
    stacks = []
    for name, (rows, columns) in shapes.items():
        codes = [routed.experts, rows, columns * routed.bits // 8]
        stacks.append(helper.make_tensor_value_info(f"{prefix}{name}.codes", TensorProto.UINT8, codes))
        stacks.append(values(f"{prefix}{name}.scales", [routed.experts, rows, columns // routed.block_size]))
    return stacks
