"""attention over latent caches: one token and many, with a past and without, several sequences at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from k2lite.backends.base import Backend, Capabilities, Segment
from k2lite.quant.formats import FORMAT_NAMES

from . import oracle
from .case import Case, Measured, demand
from .samples import matrix, normal, on_device

# Scores, softmax and two sums follow one another.
GROWTH = 4.0


@dataclass(frozen=True)
class Shape:
    """Heads, and the widths of a head: keys without rotation, rotary keys, values, latent."""

    heads: int = 4
    nope: int = 32
    rotary: int = 16
    value: int = 32
    rank: int = 128


SMALL = Shape()
# One sequence is (tokens before, new tokens).
SEQUENCES = {
    "first token": [(0, 1)],
    "prefill": [(0, 13)],
    "decode": [(150, 1)],
    "chunk after a past": [(37, 9)],
    "ragged batch": [(5, 1), (0, 7), (90, 1), (2, 3)],
}


def cases() -> Iterator[Case]:
    for name, lengths in SEQUENCES.items():
        yield Case("attention", name, partial(_attention, SMALL, lengths, "f32", 1.0), _takes("f32"))
    large = Shape(heads=2, nope=128, rotary=64, value=128, rank=512)
    yield Case("attention", "K2's head", partial(_attention, large, [(33, 2), (0, 3)], "bf16", 1.0), _takes("bf16"))
    yield Case("attention", "large scores", partial(_attention, SMALL, [(20, 4)], "f32", 40.0), _takes("f32"))
    for name in FORMAT_NAMES:
        yield Case("attention", f"kv_b {name}", partial(_attention, SMALL, [(9, 3)], name, 1.0), _takes(name))
    yield Case("attention", "bits", _bits, _takes("f32"))
    yield Case("attention", "no look ahead", _causal, _takes("f32"))


class _takes:
    """Whether a backend's table has this format."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, can: Capabilities) -> bool:
        return self._name in can.formats


@dataclass(frozen=True)
class _Batch:
    q_nope: torch.Tensor
    q_rope: torch.Tensor
    segments: list[tuple[int, int, torch.Tensor]]

    def on(self, backend: Backend) -> tuple[torch.Tensor, torch.Tensor, list[Segment]]:
        segments = [Segment(start, stop, backend.upload(latent)) for start, stop, latent in self.segments]
        return backend.upload(self.q_nope), backend.upload(self.q_rope), segments


def _batch(shape: Shape, lengths: list[tuple[int, int]], growth: float) -> _Batch:
    segments, at = [], 0
    for number, (past, new) in enumerate(lengths):
        segments.append((at, at + new, normal(50 + number, past + new, shape.rank + shape.rotary)))
        at += new
    queries = normal(40, at, shape.heads, shape.nope), normal(41, at, shape.heads, shape.rotary)
    return _Batch(growth * queries[0], growth * queries[1], segments)


def _attention(shape: Shape, lengths: list[tuple[int, int]], format: str, growth: float, backend: Backend) -> Measured:
    batch = _batch(shape, lengths, growth)
    kv_b = matrix(42, format, shape.heads * (shape.nope + shape.value), shape.rank)
    scale = (shape.nope + shape.rotary) ** -0.5
    found = backend.attention(*batch.on(backend), on_device(backend, kv_b), scale)
    segments = [(start, stop, oracle.exact(latent)) for start, stop, latent in batch.segments]
    expected = oracle.attention(
        oracle.exact(batch.q_nope), oracle.exact(batch.q_rope), segments, oracle.weight_values(kv_b), scale
    )
    numerics = backend.capabilities().numerics
    # an error of a score is an error of its exponential, as large as the score
    bound = GROWTH * max(1.0, growth) * max(numerics.linear_error, numerics.vector_error)
    return Measured(oracle.relative_error(found, expected), bound)


def _bits(backend: Backend) -> None:
    """The same twice; and alone or among others, whole or in chunks, if the backend promises it."""
    lengths = [(5, 1), (0, 7), (30, 2)]
    batch = _batch(SMALL, lengths, 1.0)
    kv_b = on_device(backend, matrix(42, "f32", SMALL.heads * (SMALL.nope + SMALL.value), SMALL.rank))
    whole = backend.attention(*batch.on(backend), kv_b, 0.1)
    demand(torch.equal(whole, backend.attention(*batch.on(backend), kv_b, 0.1)), "another result the second time")
    if not backend.capabilities().numerics.batch_invariant:
        return
    for start, stop, latent in batch.segments:
        past = len(latent) - (stop - start)
        for row in range(start, stop):
            seen = latent[: past + row - start + 1].contiguous()
            one = _Batch(batch.q_nope[row : row + 1], batch.q_rope[row : row + 1], [(0, 1, seen)])
            alone = backend.attention(*one.on(backend), kv_b, 0.1)[0]
            demand(torch.equal(alone, whole[row]), f"row {row} alone has other bits than among others")


def _causal(backend: Backend) -> None:
    """What comes after a token, though it lies in the cache already, changes nothing for it."""
    batch = _batch(SMALL, [(4, 6)], 1.0)
    kv_b = on_device(backend, matrix(42, "f32", SMALL.heads * (SMALL.nope + SMALL.value), SMALL.rank))
    before = backend.attention(*batch.on(backend), kv_b, 0.1)
    batch.segments[0][2][-1] = 100.0
    after = backend.attention(*batch.on(backend), kv_b, 0.1)
    demand(torch.equal(before[:-1], after[:-1]), "a later token's latent changed an earlier token's result")
    demand(not torch.equal(before[-1], after[-1]), "a token does not see its own latent")
