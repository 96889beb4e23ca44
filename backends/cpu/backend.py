"""The CPU backend: hands the model's operations to kernels, keeps no weights.

Invariant: a token's result has the same bits for any batch, chunk, thread count and instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from k2lite.backends.base import DONE, Assignment, Backend, Capabilities, Event, Memory, RoutingRule, Segment
from k2lite.backends.host_memory import ask_for_large_pages, host_memory
from k2lite.quant.errors import RequestError
from k2lite.quant.types import ExpertWeights, QuantTensor

from .activations import PIECE, prepare, prepared_bytes
from .attention_call import run_attention
from .compiler import compile_all
from .compute_team import ComputeTeam
from .elementwise import COLUMNS, choose_experts, combine, rms_norm
from .expert_table import expert_table, one_preparation
from .experts import down, expert_scratch_bytes, gate_up, silu_rows
from .int_linear import ROWS
from .matrix import IN, OUT, matrix_fields, preparation
from .multiply import linear_rows, multiply, multiply_scratch_bytes
from .spec import capabilities

ACTIVATIONS = ("int8", "bf16")


class CpuBackend(Backend):
    """activations: what inputs of integer weights are rounded to. threads: by default what the process may use.

    Opening one leaves torch one thread, in the whole process."""

    name: ClassVar[str] = "cpu"

    def __init__(self, *, activations: str = "int8", threads: int | None = None) -> None:
        if activations not in ACTIVATIONS:
            raise RequestError(f"activations is {activations!r}; known: {', '.join(ACTIVATIONS)}")
        self.device = torch.device("cpu")
        self._rounded = activations == "bf16"
        self._activations = activations
        compile_all()
        self._team = ComputeTeam(threads)
        # what torch still does is small, and its own threads would spin beside ours on the same cores
        torch.set_num_threads(1)

    @property
    def threads(self) -> int:
        return self._team.threads

    def capabilities(self) -> Capabilities:
        return capabilities(self._activations)

    def memory(self) -> Memory:
        return host_memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        ask_for_large_pages(memory)
        return memory

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        x = _rows(x)
        out = torch.empty(len(x), weight.shape[0])
        if not out.numel():
            return out
        fields = matrix_fields(weight, self._rounded)
        matrix = np.array(fields, np.int64)
        prepared = self._prepare(x, preparation(fields, self._rounded))
        tokens, outputs = addresses(prepared), addresses(out)
        arguments = [multiply.address, matrix.ctypes.data, tokens.ctypes.data, len(x), outputs.ctypes.data]
        tasks = -(-fields[OUT] // ROWS)
        self._team.launch(linear_rows, arguments, tasks, multiply_scratch_bytes(fields[IN]))
        return out

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        x = _rows(x)
        if not len(x):
            return torch.empty(0, weights.down_proj.shape[0])
        out = torch.empty(len(x), 1, weights.down_proj.shape[0])
        if one_preparation(weights, self._rounded):
            rows = torch.arange(len(x))
            self._experts(x, [Assignment(weights, rows, torch.zeros_like(rows))], out)
            return out[:, 0]
        return self.linear(self._swiglu(x, weights), weights.down_proj)

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        x = _rows(x)
        for group in _alike([item for item in work if len(item.rows)]):
            if one_preparation(group[0].expert, self._rounded):
                self._experts(x, group, out)
            else:
                super().expert_ffn(x, group, out)
        return DONE

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = _rows(x)
        out, number = torch.empty(x.shape), np.array([eps], np.float32)
        arguments = [x.data_ptr(), x.stride(0) * 4, x.shape[1], weight.data_ptr(), number.ctypes.data, out.data_ptr()]
        self._team.launch(rms_norm, arguments, len(x))
        return out

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted, logits = rule.num_experts_per_tok, self.linear(x, weight)
        ids = torch.empty(len(x), wanted, dtype=torch.int64)
        weights = torch.empty(len(x), wanted)
        factor = np.array([rule.routed_scaling_factor], np.float32)
        arguments = [
            logits.data_ptr(), bias.data_ptr(), ids.data_ptr(), weights.data_ptr(), logits.shape[1], wanted,
            rule.n_group, rule.topk_group, rule.norm_topk_prob, factor.ctypes.data,
        ]  # fmt: skip
        self._team.launch(choose_experts, arguments, len(x), 24 * logits.shape[1])
        return ids, weights

    def combine(self, out: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        out, weights, shared = out.contiguous(), weights.contiguous(), shared.contiguous()
        tokens, experts, columns = out.shape
        total, pieces = torch.empty(tokens, columns), -(-columns // COLUMNS)
        pointers = [tensor.data_ptr() for tensor in (out, weights, shared, total)]
        self._team.launch(combine, [*pointers, experts, columns, pieces], tokens * pieces)
        return total

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        tokens, heads, nope = q_nope.shape
        out = torch.empty(tokens, heads, kv_b.shape[0] // heads - nope)
        if tokens:
            fields = matrix_fields(kv_b, self._rounded)
            run_attention(self._team, q_nope, q_rope, segments, fields, scale, out)
        return out

    def _experts(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> None:
        """Experts of equal shapes and formats."""
        gate = matrix_fields(work[0].expert.gate_proj, self._rounded)
        counts = [len(item.rows) for item in work]
        if sum(counts) < len(x):  # a few experts of a large batch: only their tokens
            wanted = torch.cat([item.rows for item in work])
            prepared = self._prepare(x[wanted], preparation(gate, self._rounded))
            places = np.split(addresses(prepared), np.cumsum(counts)[:-1])
        else:
            prepared = self._prepare(x, preparation(gate, self._rounded))
            each = addresses(prepared)
            places = [each[item.rows.numpy()] for item in work]
        table = expert_table(work, places, out, self._rounded)
        entries, scratch = table.entries.ctypes.data, expert_scratch_bytes(table.hidden, table.width)
        blocks = -(-table.width // ROWS)
        arguments = [
            multiply.address,
            entries,
            blocks,
            table.width,
            table.inner_how,
            table.inner_bytes,
            table.inner_groups,
        ]
        self._team.launch(gate_up, arguments, len(work) * blocks, scratch)
        blocks = -(-out.shape[-1] // ROWS)
        self._team.launch(down, [multiply.address, entries, blocks], len(work) * blocks, scratch)

    def _swiglu(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        width = weights.gate_proj.shape[0]
        padded = [torch.zeros(len(x), -(-width // 32) * 32) for _ in range(2)]
        for rows, weight in zip(padded, (weights.gate_proj, weights.up_proj), strict=True):
            rows[:, :width] = self.linear(x, weight)
        gate, up = (rows.data_ptr() for rows in padded)
        self._team.launch(silu_rows, [gate, up, gate], padded[0].numel() // 32)
        return padded[0][:, :width]

    def _prepare(self, x: torch.Tensor, how: int) -> torch.Tensor:
        """Each row of x as kernels take it: uint8 [T, bytes]."""
        prepared = torch.empty(len(x), prepared_bytes(x.shape[1], how), dtype=torch.uint8)
        rows = addresses(x)
        pieces = max(1, -(-x.shape[1] // PIECE))
        arguments = [rows.ctypes.data, x.shape[1], prepared.data_ptr(), prepared.shape[1], how, pieces]
        self._team.launch(prepare, arguments, len(x) * pieces)
        return prepared


def _alike(work: Sequence[Assignment]) -> list[list[Assignment]]:
    """Assignments by their experts' formats and shapes, which decide the kernels' path."""
    groups: dict[object, list[Assignment]] = {}
    for item in work:
        key = tuple((weight.format, weight.shape) for weight in item.expert)
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _rows(x: torch.Tensor) -> torch.Tensor:
    """float32 with contiguous rows."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()


def addresses(rows: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where each row of a matrix begins."""
    step = rows.stride(0) * rows.element_size()
    return rows.data_ptr() + step * np.arange(len(rows), dtype=np.int64)
