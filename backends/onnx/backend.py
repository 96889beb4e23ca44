"""The backend on ONNX Runtime's CPU provider. Matrix products and experts run there, the rest in plain torch.

Invariant: a session knows a shape and no weight. Its matrix kernels choose their order of sums by the number of rows,
so a token's bits depend on the chunk it came in (Numerics.batch_invariant is False).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnxruntime
import torch

from k2lite.quant.formats import PACKED_INT, QuantFormat, Shape
from k2lite.quant.types import ExpertWeights, QuantTensor

from ..base import DONE, Backend, Capabilities, Event, ExpertSlot, Memory, UnsupportedOperationError
from ..host_memory import host_memory
from ..packing import ALIGNMENT, views
from .graphs import Stored, expert_graph, input_names, linear_graph
from .spec import CAPABILITIES, PROVIDER

Feed = dict[str, np.ndarray]


class OnnxBackend(Backend):
    """Sessions are made when a shape is first met and kept."""

    name: ClassVar[str] = "onnx"
    contract: ClassVar[int] = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        # each session has threads of its own; those that have nothing to do must not turn in circles
        self._options.intra_op_num_threads = torch.get_num_threads()
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions: dict[tuple[Stored, ...], onnxruntime.InferenceSession] = {}

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def memory(self) -> Memory:
        return host_memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        stored = _stored(weight)
        if not len(x):
            return x.new_empty(0, stored.rows)
        return self._run((stored,), x, _feed("w", weight, stored))

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        matrices = [_stored(weight) for weight in weights]
        if not len(x):
            return x.new_empty(0, matrices[2].rows)
        feed: Feed = {}
        for name, weight, stored in zip(("gate", "up", "down"), weights, matrices, strict=True):
            feed |= _feed(name, weight, stored)
        return self._run(tuple(matrices), x, feed)

    def expert_slot(self, expert: Sequence[tuple[QuantFormat, Shape]]) -> ExpertSlot:
        """Codes as stored and scales in float32, which is what the kernels take."""
        return ExpertSlot(sum(_slot_bytes(stored, shape) for stored, shape in expert), repacked=True)

    def pack_expert(self, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
        packed = self.packed_views([(weight.format, weight.shape) for weight in src], slot)
        for weight, room in zip(src, packed, strict=True):
            for suffix, part in _multiplied(weight).items():
                room.parts[suffix].copy_(part)
        return packed

    def packed_views(self, expert: Sequence[tuple[QuantFormat, Shape]], memory: torch.Tensor) -> ExpertWeights:
        return views([(stored, shape, _multiplied_parts(stored, shape)) for stored, shape in expert], memory)

    def _run(self, matrices: tuple[Stored, ...], x: torch.Tensor, feed: Feed) -> torch.Tensor:
        session = self._sessions.get(matrices)
        if session is None:
            graph = linear_graph(*matrices) if len(matrices) == 1 else expert_graph(*matrices)
            session = onnxruntime.InferenceSession(graph.SerializeToString(), self._options, providers=[PROVIDER])
            self._sessions[matrices] = session
        (result,) = session.run(None, {"x": x.contiguous().numpy(), **feed})
        return torch.from_numpy(result)


def _stored(weight: QuantTensor) -> Stored:
    rows, columns = weight.shape
    name = weight.format.name
    if name in PACKED_INT:
        return Stored(rows, columns, *PACKED_INT[name])
    if name not in CAPABILITIES.formats:
        raise UnsupportedOperationError(f"backend onnx can't multiply {name}; with --allow-fallback plain torch does")
    return Stored(rows, columns)


def _feed(name: str, weight: QuantTensor, stored: Stored) -> Feed:
    """A weight's stored tensors as the graph takes them. Words are bytes, the lowest first: on little-endian machines
    the same memory. BF16 becomes float32, exactly."""
    names = input_names(name, stored)
    parts = weight.parts
    if not stored.bits:
        return {names[0]: parts["weight"].to(torch.float32).contiguous().numpy()}
    codes = parts["weight_packed"].contiguous().view(torch.uint8)
    scales = parts["weight_scale"].to(torch.float32)
    if stored.block_size is None:
        return {names[0]: codes.numpy(), names[1]: scales.reshape(-1).contiguous().numpy()}
    return {names[0]: codes.view(stored.rows, scales.shape[1], -1).numpy(), names[1]: scales.contiguous().numpy()}


def _multiplied(weight: QuantTensor) -> dict[str, torch.Tensor]:
    """The parts that multiply, in the dtypes in which they do. weight_shape is none of them."""
    if weight.format.name not in PACKED_INT:
        return {"weight": weight.parts["weight"].to(torch.float32)}
    scale = weight.parts["weight_scale"].to(torch.float32)
    return {"weight_packed": weight.parts["weight_packed"], "weight_scale": scale}


def _multiplied_parts(stored: QuantFormat, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
    """Dtypes and shapes of what `_multiplied` gives."""
    if stored.name not in PACKED_INT:
        return {"weight": (torch.float32, shape)}
    parts = stored.parts(shape)
    return {"weight_packed": parts["weight_packed"], "weight_scale": (torch.float32, parts["weight_scale"][1])}


def _slot_bytes(stored: QuantFormat, shape: Shape) -> int:
    parts = _multiplied_parts(stored, shape).values()
    return sum(_aligned(dtype.itemsize * math.prod(size)) for dtype, size in parts)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
