"""The seam to whatever multiplies.

A backend must write five methods (capabilities, memory, alloc, copy, linear); all others have defaults made of
these, correct on any device and slow. It becomes fast by overriding. torch.Tensor on `.device` is the currency,
activations are float32 here; weights arrive as stored (QuantTensor). Never sees a cache or a file.

Every default works on one token at a time: the bits of a token's result then can't depend on who shares its batch.

Shapes: T tokens, D hidden, F expert width, E experts, K active experts, H heads, N cached tokens, R latent width,
P rotary width, V value width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from k2lite.quant.errors import BackendError
from k2lite.quant.formats import QuantFormat, Shape
from k2lite.quant.types import ExpertWeights, QuantTensor

from .packing import copy_into_slot, slot_bytes, stored_views

# Raised by one when a method's meaning changes, or a new one is required.
CONTRACT = 1


class Event(Protocol):
    """Something a device has yet to finish."""

    def wait(self) -> None: ...


class _Done:
    def wait(self) -> None:
        return None


DONE: Event = _Done()


class UnsupportedOperationError(BackendError):
    """An operation can't be done on these formats or shapes. With --allow-fallback plain torch does it instead."""


@dataclass(frozen=True)
class Numerics:
    """What a backend promises about its results; the conformance suite (k2lite.testing) holds it to that.

    linear_error: largest error of linear's rows, relative to the product of the lengths of input and weight row over
    the root of the width, which is the size of a sum of such numbers (float32 has about 1e-6, activations rounded to
    int8 about 2e-2).
    vector_error: the same for norms, rotation, sums, softmax and the router, whose weights are plain numbers.
    batch_invariant: a token's bits do not depend on who shares its batch, nor on the chunk it came in."""

    linear_error: float = 1e-5
    vector_error: float = 1e-5
    batch_invariant: bool = True


@dataclass(frozen=True)
class Capabilities:
    """What a backend can multiply, and the name of its arithmetic: two runs with equal names give equal bits.

    formats: of trunk weights; expert_formats: of routed experts, if those are others. A format's name has its group
    size. dtypes: what activations are held in while it multiplies. max_experts: most routed experts a layer."""

    formats: frozenset[str]
    arithmetic: str
    expert_formats: frozenset[str] | None = None
    dtypes: tuple[str, ...] = ("float32",)
    max_experts: int | None = None
    numerics: Numerics = Numerics()

    def formats_of(self, *, experts: bool) -> frozenset[str]:
        """The formats of routed experts, or of everything else."""
        return self.expert_formats if experts and self.expert_formats is not None else self.formats


@dataclass(frozen=True)
class ExpertSlot:
    """What an expert takes in a backend's memory: bytes of one slot, how many slots one arena may have at most, and
    whether the bytes are others than those stored (then experts go through `pack_expert` before they multiply).
    beside_bytes: what multiplying wants besides for each slot of the largest arena; all arenas share it."""

    nbytes: int
    max_slots: int | None = None
    repacked: bool = False
    beside_bytes: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of the memory that `alloc` draws from."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class RoutingRule:
    """How scores become a choice: names as in the model's config."""

    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True)
class Segment:
    """The rows [start, stop) of a batch that belong to one sequence, and that sequence's cache in this layer.

    `latent` is [N, R + P], the new tokens' own rows included as the last stop - start ones."""

    start: int
    stop: int
    latent: torch.Tensor


@dataclass(frozen=True)
class Assignment:
    """One expert's work: row `rows[i]` of the batch, whose result goes to its slot `slots[i]` of K."""

    expert: ExpertWeights
    rows: torch.Tensor  # int64 [n]
    slots: torch.Tensor  # int64 [n]


class Backend(ABC):
    """One device. The caller owns all weights; a backend keeps no reference to them between calls."""

    name: ClassVar[str]
    contract: ClassVar[int] = CONTRACT
    # Raised by a backend when `pack_expert` lays bytes out otherwise: packed copies on the drive are made anew then.
    layout_version: ClassVar[int] = 1
    device: torch.device

    # -- required ---------------------------------------------------------------------------------------------

    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def memory(self) -> Memory: ...

    @abstractmethod
    def alloc(self, nbytes: int) -> torch.Tensor:
        """Uninitialized bytes, uint8 [nbytes], on the device, aligned to 64 bytes."""

    @abstractmethod
    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        """Start copying `src` into `dst`, of equal shape and dtype; `src` must stay as it is until the event."""

    @abstractmethod
    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        """x [T, in] times the transpose of weight [out, in]: float32 [T, out]."""

    # -- optional, with defaults --------------------------------------------------------------------------------

    def close(self) -> None:  # noqa: B027 (most backends keep nothing running)
        """End what the backend keeps running; it is of no use afterwards. A second call does nothing."""

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in the device's memory."""
        bytes_there = self.alloc(tensor.nbytes)
        there = bytes_there.view(tensor.dtype).view(tensor.shape)
        self.copy(tensor, there).wait()
        return there

    def upload_matrix(self, weight: QuantTensor) -> QuantTensor:
        """A matrix of the trunk in the device's memory, for `linear`: by default as stored. A layout of its own has a
        format that keeps the stored one's name and dequantizes to the same values."""
        parts = {suffix: self.upload(part) for suffix, part in weight.parts.items()}
        return QuantTensor(weight.format, weight.shape, parts)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values where the processor can read them; the tensor itself if it lies there."""
        if tensor.device.type == "cpu":
            return tensor
        here = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.copy(tensor, here).wait()
        return here

    def empty(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized values on the device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def telling(self) -> AbstractContextManager[None]:
        """What the vendor raises inside becomes, where the user can act on it, an error of ours that says how."""
        return nullcontext()

    def expert_slot(self, expert: Sequence[tuple[QuantFormat, Shape]]) -> ExpertSlot:
        """The room for an expert whose three matrices are stored so: by default the bytes as stored, each part on a
        boundary of 64 bytes."""
        return ExpertSlot(slot_bytes(expert))

    def alloc_slots(self, expert: Sequence[tuple[QuantFormat, Shape]], count: int) -> Sequence[torch.Tensor]:
        """Room for `count` experts that are stored so; each entry goes to `pack_expert` as it is. By default slots of
        `alloc`; a backend that multiplies many experts as one tensor lays them out for that."""
        room = self.expert_slot(expert)
        return [self.alloc(room.nbytes) for _ in range(count)]

    def pack_expert(self, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
        """Put an expert into `slot`, uint8 [expert_slot(...).nbytes] or one of `alloc_slots`; returns what to multiply
        with, views into it. Where bytes are laid out anew, the matrices returned have a format that dequantizes
        them."""
        return copy_into_slot(src, slot, self.copy)

    def packed_views(self, expert: Sequence[tuple[QuantFormat, Shape]], memory: torch.Tensor) -> ExpertWeights:
        """An expert that is stored so, as views into `memory`, uint8 [expert_slot(expert).nbytes] of the host, which
        holds what `pack_expert` left in a slot of `alloc`, on another day perhaps. `pack_expert` takes such weights too
        and copies their bytes as they are. By default the parts as stored; a backend that lays bytes out anew overrides
        it to have packed copies (--packed-copy)."""
        if self.expert_slot(expert).repacked:
            raise UnsupportedOperationError(
                f"backend {self.name} lays experts out anew and has no packed_views, so it takes no packed copy"
            )
        return stored_views(expert, memory)

    def embed(self, ids: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        """Rows `ids` (int64 [T]) of an unquantized table [vocab, D]: float32 [T, D]."""
        return weight.parts["weight"][ids].to(torch.float32)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """weight * x / sqrt(mean(x^2) + eps) over the last axis of x [T, n]; weight is float32 [n]."""

        def one(row: torch.Tensor) -> torch.Tensor:
            mean_square = (row * row).sum(-1) / row.shape[-1]
            return weight * (row * torch.rsqrt(mean_square + eps))

        return by_token(one, x)

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate interleaved pairs of x [T, ..., P] by tables [T, P / 2]."""
        between = [1] * (x.dim() - 2)
        cos, sin = (table.view(table.shape[0], *between, table.shape[1]) for table in (cos, sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose K of E experts for each row of x [T, D]; weight [E, D], bias float32 [E].

        Returns ids int64 [T, K] in ascending order and their weights float32 [T, K]. The bias enters the choice
        only; ties go to the lowest id. Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)."""
        rows = [route(row, bias, rule) for row in self.linear(x, weight)]
        if not rows:
            return x.new_empty(0, rule.num_experts_per_tok, dtype=torch.int64), x.new_empty(0, rule.num_experts_per_tok)
        ids, weights = zip(*rows, strict=True)
        return torch.stack(ids), torch.stack(weights)

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)) for x [T, D]: [T, D]."""
        return self.linear(self._swiglu(x, weights), weights.down_proj)

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        """Write each assignment's results into out [T, K, D]; x is [T, D]. The order of `work` changes no bit."""
        for item in work:
            out[item.rows, item.slots] = self.mlp(x[item.rows], item.expert)
        return DONE

    def combine(self, out: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """Sum out [T, K, D] times weights [T, K] in slot order, that is by ascending expert id, then add the shared
        expert's result [T, D], which has no weight."""
        total = torch.zeros_like(shared)
        for slot in range(out.shape[1]):
            total = total + out[:, slot] * weights[:, slot, None]
        return total + shared

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        """Causal MLA in the absorbed form: queries [T, H, nope] and [T, H, P] against each segment's latent cache.

        kv_b is [H * (nope + V), R]: for each head its key rows, then its value rows. Returns [T, H, V].
        Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1)."""
        heads, nope = q_nope.shape[1:]
        per_head = kv_b.dequantize().view(heads, -1, kv_b.shape[1])
        key_rows = per_head[:, :nope].transpose(1, 2).contiguous()  # [H, R, nope]
        value_rows = per_head[:, nope:]  # [H, V, R]
        out = q_nope.new_empty(q_nope.shape[0], heads, value_rows.shape[1])
        for token, latent in causal_rows(segments):
            absorbed = dot(key_rows, q_nope[token][:, None])  # [H, R]
            query = torch.cat((absorbed, q_rope[token]), dim=-1)
            p = softmax(dot(query[:, None], latent) * scale)  # [H, N]
            mixed = dot(p[:, None], latent[:, : kv_b.shape[1]].T.contiguous())  # [H, R]
            out[token] = dot(value_rows, mixed[:, None])
        return out

    def _swiglu(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        up = self.linear(x, weights.up_proj)
        return by_token(torch.nn.functional.silu, self.linear(x, weights.gate_proj)) * up


def by_token(op: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply an operation that keeps a row's shape to each row of x: vector libraries round the tail of an array
    otherwise than its body, so a row's bits would depend on the rows beside it."""
    return torch.stack([op(row) for row in x]) if len(x) else x.clone()


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products over the last axis. A product and a sum keep one order whatever the thread count or the number
    of rows; a matrix library picks its algorithm by shape."""
    return (a * b).sum(-1)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, dim=-1)


def causal_rows(segments: Sequence[Segment]) -> list[tuple[int, torch.Tensor]]:
    """Each row of the batch with the cache rows it may see, its own included."""
    rows = []
    for segment in segments:
        past = segment.latent.shape[0] - (segment.stop - segment.start)
        rows += [(row, segment.latent[: past + row - segment.start + 1]) for row in range(segment.start, segment.stop)]
    return rows


def route(logits: torch.Tensor, bias: torch.Tensor, rule: RoutingRule) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice for one token from its router logits [E]: ids [K] ascending and weights [K]."""
    scores = torch.sigmoid(logits)
    choice = scores + bias
    if rule.n_group > 1:
        groups = choice.view(rule.n_group, -1)
        best_two = groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.sort(best_two, descending=True, stable=True).indices[: rule.topk_group]
        masked = torch.full_like(groups, -torch.inf)
        masked[kept] = groups[kept]
        choice = masked.flatten()
    # a stable sort, since topk leaves open which of two equal scores it takes
    ids = torch.sort(choice, descending=True, stable=True).indices[: rule.num_experts_per_tok].sort().values
    weights = scores[ids]
    if rule.norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return ids, weights * rule.routed_scaling_factor
