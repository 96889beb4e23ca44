"""The CPU backend: hands the model's operations to kernels, keeps no weights.

Invariant: a token's result has the same bits for any batch, chunk, thread count and instruction set.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import ClassVar

import torch

from k2lite.backends.base import DONE, Assignment, Backend, Capabilities, Event, Memory, RoutingRule, Segment
from k2lite.backends.host_memory import ask_for_large_pages, host_memory
from k2lite.quant.errors import RequestError
from k2lite.quant.types import ExpertWeights, QuantTensor

from .attention_call import run_attention
from .compiler import compile_all
from .compute_team import ComputeTeam, phase
from .elementwise import COLUMNS, choose_experts, combine, rms_norm, rotate
from .expert_call import ExpertCall, expert_call, run_experts
from .experts import silu_rows
from .int_linear import ROWS
from .matrix import Matrix, matrix_of
from .multiply import linear_rows, multiply, multiply_scratch_bytes
from .preparation import is_small, prepare_rows
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

    def close(self) -> None:
        self._team.close()

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        x, matrix = _rows(x), matrix_of(weight, self._rounded)
        out = torch.empty(x.shape[0], matrix.out)
        if out.numel():
            with self._team as team:
                team.run(self._product(x, matrix, out), multiply_scratch_bytes(matrix.columns))
        return out

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        x = _rows(x)
        tokens = x.shape[0]
        out = torch.empty(tokens, weights.down_proj.shape[0])
        if not tokens:
            return out
        call = expert_call(weights, None, None, tokens, self._rounded)
        if call is None:
            return self.linear(self._swiglu(x, weights), weights.down_proj)
        run_experts(self._team, x, [call], out[:, None])
        return out

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        x = _rows(x)
        groups: dict[tuple[int, int, int], list[ExpertCall]] = {}
        for item in work:
            count = item.rows.shape[0]
            call = expert_call(item.expert, item.rows.contiguous(), item.slots.contiguous(), count, self._rounded)
            if call is None:
                super().expert_ffn(x, [item], out)
            elif count:
                groups.setdefault(call.alike, []).append(call)
        for calls in groups.values():
            run_experts(self._team, x, calls, out)
        return DONE

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = _rows(x)
        tokens, columns = x.shape
        out, number = torch.empty(tokens, columns), array("f", [eps])
        arguments = [
            x.data_ptr(), 4 * x.stride(0), columns, weight.data_ptr(), number.buffer_info()[0], out.data_ptr(),
        ]  # fmt: skip
        self._team.run(phase(rms_norm, arguments, tokens, alone=is_small(4 * tokens * columns)))
        return out

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if x.dim() not in (2, 3) or x.stride(-1) != 1 or x.dtype != torch.float32:
            return super().rope(x, cos, sin)
        cos, sin, out = cos.contiguous(), sin.contiguous(), torch.empty(x.shape)
        tokens, heads, width = x.shape[0], 1 if x.dim() == 2 else x.shape[1], x.shape[-1]
        arguments = [
            x.data_ptr(), 4 * x.stride(0), 4 * x.stride(-2), heads, width // 2, cos.data_ptr(), sin.data_ptr(),
            out.data_ptr(),
        ]  # fmt: skip
        self._team.run(phase(rotate, arguments, tokens, alone=is_small(8 * x.numel())))
        return out

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, matrix = _rows(x), matrix_of(weight, self._rounded)
        tokens, experts, wanted = x.shape[0], matrix.out, rule.num_experts_per_tok
        ids = torch.empty(tokens, wanted, dtype=torch.int64)
        weights = torch.empty(tokens, wanted)
        if not tokens:
            return ids, weights
        logits, factor = torch.empty(tokens, experts), array("f", [rule.routed_scaling_factor])
        arguments = [
            logits.data_ptr(), bias.data_ptr(), ids.data_ptr(), weights.data_ptr(), experts, wanted,
            rule.n_group, rule.topk_group, rule.norm_topk_prob, factor.buffer_info()[0],
        ]  # fmt: skip
        choice = phase(choose_experts, arguments, tokens, alone=is_small(16 * tokens * wanted * experts))
        with self._team as team:
            program = self._product(x, matrix, logits) + choice
            team.run(program, max(multiply_scratch_bytes(matrix.columns), 24 * experts))
        return ids, weights

    def combine(self, out: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        out, weights, shared = out.contiguous(), weights.contiguous(), shared.contiguous()
        tokens, experts, columns = out.shape
        total, pieces = torch.empty(tokens, columns), -(-columns // COLUMNS)
        pointers = [tensor.data_ptr() for tensor in (out, weights, shared, total)]
        arguments = [*pointers, experts, columns, pieces]
        self._team.run(phase(combine, arguments, tokens * pieces, alone=is_small(4 * out.numel())))
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
            queries = _rows(q_nope), _rows(q_rope)
            run_attention(self._team, *queries, segments, matrix_of(kv_b, self._rounded), scale, out)
        return out

    def _product(self, x: torch.Tensor, matrix: Matrix, out: torch.Tensor) -> list[int]:
        """The program of out = x times the transpose of a matrix. It takes the team's room."""
        tokens, columns = out.shape
        prepared = self._team.room(tokens * (matrix.prepared_bytes + 16))
        inputs = prepared + tokens * matrix.prepared_bytes
        outputs = inputs + 8 * tokens
        program = prepare_rows(x, None, tokens, matrix, prepared, inputs, (outputs, out.data_ptr(), 4 * columns))
        arguments = [multiply.address, matrix.address, inputs, tokens, outputs]
        small = is_small(tokens * matrix.nbytes)
        return program + phase(linear_rows, arguments, -(-columns // ROWS), alone=small)

    def _swiglu(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        width = weights.gate_proj.shape[0]
        padded = [torch.zeros(len(x), -(-width // 32) * 32) for _ in range(2)]
        for rows, weight in zip(padded, (weights.gate_proj, weights.up_proj), strict=True):
            rows[:, :width] = self.linear(x, weight)
        gate, up = (rows.data_ptr() for rows in padded)
        self._team.launch(silu_rows, [gate, up, gate], padded[0].numel() // 32)
        return padded[0][:, :width]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """float32 with contiguous rows."""
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or not x.numel() else x.contiguous()
