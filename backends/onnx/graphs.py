"""The ONNX graphs that the backend runs: y = x W^T for each way a weight is stored, and an expert's whole block.

Weights are inputs of a graph, not part of it: one session a shape serves every layer and expert, and nothing is copied.
(Then accuracy_level has no effect: sums are float32.) Knows no torch and runs nothing.
Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits; ONNX, Gemm and DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto, helper
from onnx.onnx_ml_pb2 import ModelProto, NodeProto, ValueInfoProto

OPSET = 21
IR_VERSION = 10


@dataclass(frozen=True)
class Stored:
    """How a weight [rows, columns] comes in. bits 0: float32 numbers. Else codes of 4 or 8 bits, stored plus half of
    their range, with a float32 scale a block of columns (block_size) or a row (None)."""

    rows: int
    columns: int
    bits: int = 0
    block_size: int | None = None


def linear_graph(stored: Stored) -> ModelProto:
    """x [T, columns] and the weight's inputs, named w.*, to y [T, rows]."""
    nodes, inputs = product("x", "y", "w", stored)
    return model(nodes, [values("x", ["T", stored.columns]), *inputs], [values("y", ["T", stored.rows])])


def expert_graph(gate: Stored, up: Stored, down: Stored) -> ModelProto:
    """x [T, D] and the inputs gate.*, up.*, down.* to y [T, D] = down(silu(gate(x)) * up(x))."""
    nodes, inputs = mlp("x", "y", "", gate, up, down)
    return model(nodes, [values("x", ["T", gate.columns]), *inputs], [values("y", ["T", down.rows])])


def mlp(
    x: str, y: str, prefix: str, gate: Stored, up: Stored, down: Stored
) -> tuple[list[NodeProto], list[ValueInfoProto]]:
    """Nodes from x [T, D] to y [T, D], and the weights' inputs; every name in between begins with `prefix`."""
    nodes: list[NodeProto] = []
    inputs: list[ValueInfoProto] = []
    gated, upped, sigmoid, silu, h = (prefix + name for name in ("gate", "up", "sigmoid", "silu", "h"))
    for name, stored in ((gated, gate), (upped, up)):
        made, wanted = product(x, name, name, stored)
        nodes, inputs = nodes + made, inputs + wanted
    nodes += [
        helper.make_node("Sigmoid", [gated], [sigmoid]),
        helper.make_node("Mul", [gated, sigmoid], [silu]),
        helper.make_node("Mul", [silu, upped], [h]),
    ]
    made, wanted = product(h, y, prefix + "down", down)
    return nodes + made, inputs + wanted


def input_names(weight: str, stored: Stored) -> tuple[str, ...]:
    """The names of a weight's inputs: its numbers, then its scales."""
    return (f"{weight}.values",) if not stored.bits else (f"{weight}.codes", f"{weight}.scales")


def product(x: str, y: str, weight: str, stored: Stored) -> tuple[list[NodeProto], list[ValueInfoProto]]:
    """Nodes from x [T, columns] to y [T, rows], and the inputs of the weight, named as `input_names` says."""
    names = input_names(weight, stored)
    rows, columns = stored.rows, stored.columns
    if not stored.bits:
        return [helper.make_node("Gemm", [x, *names], [y], transB=1)], [values(names[0], [rows, columns])]
    if stored.block_size is None:
        middle = helper.make_node("Constant", [], [f"{weight}.middle"], value=_full(rows, 1 << (stored.bits - 1)))
        dequantized = helper.make_node("DequantizeLinear", [*names, f"{weight}.middle"], [f"{weight}.values"], axis=0)
        multiplied = helper.make_node("Gemm", [x, f"{weight}.values"], [y], transB=1)
        codes = helper.make_tensor_value_info(names[0], TensorProto.UINT8, [rows, columns])
        return [middle, dequantized, multiplied], [codes, values(names[1], [rows])]
    blocks = columns // stored.block_size
    node = helper.make_node(
        "MatMulNBits", [x, *names], [y], domain="com.microsoft",
        K=columns, N=rows, bits=stored.bits, block_size=stored.block_size,
    )  # fmt: skip
    shape = [rows, blocks, stored.block_size * stored.bits // 8]
    codes = helper.make_tensor_value_info(names[0], TensorProto.UINT8, shape)
    return [node], [codes, values(names[1], [rows, blocks])]


def _full(size: int, value: int) -> TensorProto:
    return helper.make_tensor("middle", TensorProto.UINT8, [size], [value] * size)


def values(name: str, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
    graph = helper.make_graph(nodes, "k2lite", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="k2lite")
