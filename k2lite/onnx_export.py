"""Feed-forward blocks of layers as one ONNX file, with the weights as external data beside it or as its inputs.

Integer codes are copied, scales become float32 exactly, other formats float32. One expert at a time is in memory.
Invariant: both files are under their own names only when they are whole, the graph last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from .config import ModelConfig
from .quant.checkpoint import Checkpoint, StoredModule
from .quant.conversion import read_rows
from .quant.durable_files import PARTIAL, locked_partial, remove_unlocked, sync
from .quant.errors import CheckpointError, RequestError
from .quant.formats import PACKED_INT
from .quant.types import PROJECTIONS, ExpertKey, QuantTensor

Weights = Literal["external", "inputs"]
ALIGNMENT = 4096
LAYER_DIGITS = 4  # of a layer's number
TAKEN = tuple(name for name, (_, group) in PACKED_INT.items() if group)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's bytes, `offset` from the tensor's first."""

    tensor: str
    offset: int
    values: Array


@dataclass(frozen=True)
class LayerExport:
    """One layer's nodes, its weights as value infos in the order of the file, and what reads their bytes."""

    layer: int
    nodes: Sequence[Any]
    weights: Sequence[Any]
    pieces: Callable[[], Iterator[Piece]]


def plan_layer(config: ModelConfig, checkpoint: Checkpoint, layer: int) -> LayerExport:
    """Raises RequestError for a layer that is none, or whose experts or choice of experts the operator has not."""
    from .backends.onnx.layer_graphs import dense_block, moe_block

    if not 0 <= layer < config.num_hidden_layers:
        raise RequestError(f"--layers: {layer} is none of the {config.num_hidden_layers} layers, which begin with 0")
    prefix, at = f"layers.{layer}.", f"model.layers.{layer}.mlp"
    if not config.is_moe(layer):
        mlp = {name: checkpoint.trunk(f"{at}.{name}.weight") for name in PROJECTIONS}
        nodes, weights = dense_block(prefix, *(_stored(weight) for weight in mlp.values()))
        return LayerExport(layer, nodes, weights, lambda: _mlp_pieces(prefix, mlp))
    routed = _routed(config, checkpoint, layer)
    shared = {name: checkpoint.trunk(f"{at}.shared_experts.{name}.weight") for name in PROJECTIONS}
    nodes, weights = moe_block(prefix, routed, tuple(_stored(weight) for weight in shared.values()))

    def pieces() -> Iterator[Piece]:
        yield Piece(f"{prefix}router.values", 0, _float(checkpoint.trunk(f"{at}.gate.weight").dequantize()))
        bias = checkpoint.trunk(f"{at}.gate.e_score_correction_bias").dequantize()
        yield Piece(f"{prefix}router.bias", 0, _float(bias))
        for number in range(config.n_routed_experts):
            yield from _expert_pieces(prefix, number, checkpoint.expert_modules(ExpertKey(layer, number)))
        yield from _mlp_pieces(f"{prefix}shared_experts.", shared)

    return LayerExport(layer, nodes, weights, pieces)


def write_onnx(path: Path, layers: Sequence[LayerExport], hidden: int, weights: Weights) -> int:
    """Write the graph to `path` and, unless they are inputs, the weights to `path` + ".data". Returns the bytes of
    both. Raises RequestError if either exists or can't be written."""
    from .backends.onnx.graphs import model, values

    data = path.with_name(path.name + ".data")
    for file in (path, data):
        if file.exists():
            raise RequestError(f"{file}: exists already; name a new file")
    wanted = [weight for layer in layers for weight in layer.weights]
    inputs = [values(f"layers.{layer.layer}.x", ["T", hidden]) for layer in layers]
    outputs = [values(f"layers.{layer.layer}.y", ["T", hidden]) for layer in layers]
    made = model(
        [n for layer in layers for n in layer.nodes], [*inputs, *(wanted if weights == "inputs" else [])], outputs
    )
    try:
        with locked_partial(path) as (graph, graph_file), locked_partial(data) as (values_file, bytes_file):
            if weights == "external":
                spans = _spans(wanted)
                _write_data(bytes_file, layers, spans)
                made.graph.initializer.extend(_external(weight, data.name, *spans[weight.name]) for weight in wanted)
            graph_file.write(made.SerializeToString())
            graph_file.flush()
            os.fsync(graph_file.fileno())
            nbytes = graph.stat().st_size + values_file.stat().st_size
            try:
                if weights == "external":
                    values_file.rename(data)
                graph.rename(path)
            finally:
                if not path.exists():  # weights without their graph would be in the next run's way
                    data.unlink(missing_ok=True)
            sync(path.absolute().parent)
    except OSError as error:
        raise RequestError(f"{path}: can't be written: {error.strerror or error}") from error
    return nbytes


def remove_leftovers(path: Path) -> list[str]:
    """Take away what runs that were cut off have left of `path`; returns names and sizes. Raises RequestError where
    another run is writing them."""
    partials = (path.with_name(path.name + end) for end in (PARTIAL, f".data{PARTIAL}"))
    return remove_unlocked(partial for partial in partials if partial.is_file())


def parse_layers(text: str) -> list[int]:
    """ "1", "1,3" or "1-4" as numbers, ascending, each once."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or max(len(first), len(last)) > LAYER_DIGITS:
            raise RequestError(f"--layers {text!r}: expected numbers as 1, 1,3 or 1-4")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise RequestError(f"--layers {text!r}: names no layer")
    return sorted(found)


def _routed(config: ModelConfig, checkpoint: Checkpoint, layer: int) -> Any:
    from .backends.onnx.layer_graphs import RoutedExperts

    keys = [ExpertKey(layer, number) for number in range(config.n_routed_experts)]
    modules = [module for key in keys for module in checkpoint.expert_modules(key).values()]
    names = {module.format.name for module in modules if module.format is not None}
    if len(names) != 1 or not names <= set(TAKEN):
        raise RequestError(
            f"layer {layer}: its experts are in {', '.join(sorted(names))}, and QMoE takes one of {', '.join(TAKEN)}; "
            f"k2lite quantize {checkpoint.folder} DST --experts int4_g32 makes a folder that can be exported"
        )
    if config.n_group > 1:
        raise RequestError(f"layer {layer}: experts are chosen in {config.n_group} groups, which QMoE can't do")
    bits, group = PACKED_INT[names.pop()]
    return RoutedExperts(
        experts=config.n_routed_experts,
        active=config.num_experts_per_tok,
        hidden=config.hidden_size,
        width=config.moe_intermediate_size,
        bits=bits,
        block_size=group or 0,
        normalize=config.norm_topk_prob,
        scaling=config.routed_scaling_factor,
    )


def _stored(weight: QuantTensor) -> Any:
    from .backends.onnx.graphs import Stored

    rows, columns = weight.shape
    return Stored(rows, columns, *PACKED_INT.get(weight.format.name, (0, None)))


def _mlp_pieces(prefix: str, matrices: dict[str, QuantTensor]) -> Iterator[Piece]:
    for name, weight in matrices.items():
        at = prefix + name.removesuffix("_proj")
        if weight.format.name in PACKED_INT:
            yield Piece(f"{at}.codes", 0, _codes(weight))
            yield Piece(f"{at}.scales", 0, _float(weight.parts["weight_scale"]))
        else:
            yield Piece(f"{at}.values", 0, _float(weight.dequantize()))


def _expert_pieces(prefix: str, number: int, modules: Any) -> Iterator[Piece]:
    gate, up, down = (_whole(modules[name]) for name in PROJECTIONS)
    stacks = {
        "fc1.codes": _alternate(_codes(gate), _codes(up)),
        "fc1.scales": _alternate(_float(gate.parts["weight_scale"]), _float(up.parts["weight_scale"])),
        "fc2.codes": _codes(down),
        "fc2.scales": _float(down.parts["weight_scale"]),
    }
    for name, array in stacks.items():
        yield Piece(prefix + name, number * array.nbytes, array)


def _whole(module: StoredModule) -> QuantTensor:
    return read_rows(module, 0, module.shape[0])


def _codes(weight: QuantTensor) -> Array:
    """The stored words as bytes: little-endian, the lowest column first."""
    array: Array = weight.parts["weight_packed"].contiguous().view(torch.uint8).numpy()
    return array


def _float(tensor: torch.Tensor) -> Array:
    array: Array = tensor.to(torch.float32).contiguous().numpy()
    return array


def _alternate(gate: Array, up: Array) -> Array:
    """Rows g0, u0, g1, u1, ..."""
    return np.ascontiguousarray(np.stack((gate, up), axis=1).reshape(2 * len(gate), -1))


def _spans(weights: Sequence[Any]) -> dict[str, tuple[int, int]]:
    """Where each weight lies in the data: offset and bytes."""
    from onnx import helper

    spans, end = {}, 0
    for weight in weights:
        kind = weight.type.tensor_type
        size = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).itemsize
        for dimension in kind.shape.dim:
            size *= dimension.dim_value
        spans[weight.name] = (end, size)
        end = -(-(end + size) // ALIGNMENT) * ALIGNMENT
    return spans


def _write_data(file: BinaryIO, layers: Sequence[LayerExport], spans: dict[str, tuple[int, int]]) -> None:
    written = dict.fromkeys(spans, 0)
    file.truncate(max(offset + size for offset, size in spans.values()))
    for layer in layers:
        for piece in layer.pieces():
            file.seek(spans[piece.tensor][0] + piece.offset)
            file.write(piece.values.data)
            written[piece.tensor] += piece.values.nbytes
    file.flush()
    os.fsync(file.fileno())
    for name, (_, size) in spans.items():
        if written[name] != size:
            raise CheckpointError(f"{name}: {written[name]} bytes were written, expected {size}")


def _external(weight: Any, file: str, offset: int, size: int) -> Any:
    from onnx import TensorProto

    kind = weight.type.tensor_type
    tensor = TensorProto(name=weight.name, data_type=kind.elem_type, dims=[d.dim_value for d in kind.shape.dim])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    return tensor
