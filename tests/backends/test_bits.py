"""Bits at the sizes where torch shares work among threads: a small model's tensors are below its threshold.

Each operation is run with several thread counts, and for one token alone and among others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from k2lite.backends.base import Segment
from k2lite.backends.reference import ReferenceBackend
from k2lite.quant.formats import format_named
from k2lite.quant.types import ExpertWeights, QuantTensor

TOKENS, HIDDEN, WIDTH = 5, 1536, 640
HEADS, NOPE, ROTARY, VALUE, RANK, PAST = 8, 64, 32, 48, 256, 150


def matrix(rows: int, columns: int, seed: int, format: str = "f32") -> QuantTensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    return QuantTensor(format_named(format), (rows, columns), format_named(format).quantize(values))


def rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(backend: ReferenceBackend, first: int, stop: int) -> torch.Tensor:
    """Tokens [first, stop) of one sequence that has PAST tokens before token 0."""
    queries, rotary = rows(TOKENS, HEADS, NOPE, seed=1), rows(TOKENS, HEADS, ROTARY, seed=2)
    latent = rows(PAST + TOKENS, RANK + ROTARY, seed=3)
    segment = Segment(0, stop - first, latent[: PAST + stop])
    kv_b = matrix(HEADS * (NOPE + VALUE), RANK, 4)
    return backend.attention(queries[first:stop], rotary[first:stop], [segment], kv_b, 0.1)


X = rows(TOKENS, HIDDEN, seed=5)
ABSORBED, NAIVE = ReferenceBackend(), ReferenceBackend(mla="naive")
MLP = ExpertWeights(
    matrix(WIDTH, HIDDEN, 6, "fp8_e4m3_b128"), matrix(WIDTH, HIDDEN, 7, "int4_g32"), matrix(HIDDEN, WIDTH, 8)
)
OPERATIONS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "linear": lambda a, b: ABSORBED.linear(X[a:b], matrix(WIDTH, HIDDEN, 9, "bf16")),
    "mlp": lambda a, b: ABSORBED.mlp(X[a:b], MLP),
    "rms_norm": lambda a, b: ABSORBED.rms_norm(X[a:b].repeat(1, 5), rows(5 * HIDDEN, seed=10), 1e-6),
    "combine": lambda a, b: ABSORBED.combine(
        rows(TOKENS, 8, 8 * HIDDEN, seed=11)[a:b], rows(TOKENS, 8, seed=12)[a:b], X[a:b].repeat(1, 8)
    ),
    "absorbed attention": lambda a, b: attention(ABSORBED, a, b),
    "naive attention": lambda a, b: attention(NAIVE, a, b),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPERATIONS)
def test_neither_threads_nor_neighbours_change_a_bit(name: str, threads: Callable[[int], None]) -> None:
    operation = OPERATIONS[name]
    threads(1)
    expected = operation(0, TOKENS)
    assert expected.isfinite().all()
    for count in (1, 2, 3, 7):
        threads(count)
        assert torch.equal(operation(0, TOKENS), expected), count
        for token in range(TOKENS):
            assert torch.equal(operation(token, token + 1)[0], expected[token]), (count, token)


def test_the_two_forms_of_attention_are_equal_but_for_rounding() -> None:
    absorbed, naive = attention(ABSORBED, 0, TOKENS), attention(NAIVE, 0, TOKENS)
    assert (absorbed - naive).abs().max() < 1e-5 * naive.abs().max()
