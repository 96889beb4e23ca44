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
    nodes, inputs = _product("x", "y", "w", stored)
    return _model(nodes, [_values("x", ["T", stored.columns]), *inputs], [_values("y", ["T", stored.rows])])


def expert_graph(gate: Stored, up: Stored, down: Stored) -> ModelProto:
    """x [T, D] and the inputs gate.*, up.*, down.* to y [T, D] = down(silu(gate(x)) * up(x))."""
    nodes: list[NodeProto] = []
    inputs = [_values("x", ["T", gate.columns])]
    for name, stored in (("gate", gate), ("up", up)):
        made, wanted = _product("x", name, name, stored)
        nodes, inputs = nodes + made, inputs + wanted
    nodes += [
        helper.make_node("Sigmoid", ["gate"], ["sigmoid"]),
        helper.make_node("Mul", ["gate", "sigmoid"], ["silu"]),
        helper.make_node("Mul", ["silu", "up"], ["h"]),
    ]
    made, wanted = _product("h", "y", "down", down)
    return _model(nodes + made, inputs + wanted, [_values("y", ["T", down.rows])])


def input_names(weight: str, stored: Stored) -> tuple[str, ...]:
    """The names of a weight's inputs: its numbers, then its scales."""
    return (f"{weight}.values",) if not stored.bits else (f"{weight}.codes", f"{weight}.scales")


def _product(x: str, y: str, weight: str, stored: Stored) -> tuple[list[NodeProto], list[ValueInfoProto]]:
    names = input_names(weight, stored)
    rows, columns = stored.rows, stored.columns
    if not stored.bits:
        return [helper.make_node("Gemm", [x, *names], [y], transB=1)], [_values(names[0], [rows, columns])]
    if stored.block_size is None:
        middle = helper.make_node("Constant", [], [f"{weight}.middle"], value=_full(rows, 1 << (stored.bits - 1)))
        values = helper.make_node("DequantizeLinear", [*names, f"{weight}.middle"], [f"{weight}.values"], axis=0)
        product = helper.make_node("Gemm", [x, f"{weight}.values"], [y], transB=1)
        codes = helper.make_tensor_value_info(names[0], TensorProto.UINT8, [rows, columns])
        return [middle, values, product], [codes, _values(names[1], [rows])]
    blocks = columns // stored.block_size
    node = helper.make_node(
        "MatMulNBits", [x, *names], [y], domain="com.microsoft",
        K=columns, N=rows, bits=stored.bits, block_size=stored.block_size,
    )  # fmt: skip
    shape = [rows, blocks, stored.block_size * stored.bits // 8]
    codes = helper.make_tensor_value_info(names[0], TensorProto.UINT8, shape)
    return [node], [codes, _values(names[1], [rows, blocks])]


def _full(size: int, value: int) -> TensorProto:
    return helper.make_tensor("middle", TensorProto.UINT8, [size], [value] * size)


def _values(name: str, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _model(nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
    graph = helper.make_graph(nodes, "k2lite", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="k2lite")
