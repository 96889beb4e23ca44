"""A whole small Kimi-K2 with random weights, in the best formats that the backend takes, token for token.

The same tokens whether experts are read first or are there already, in chunks and beside other sequences (where the
backend is batch-invariant), and float64's tokens but where float64 itself was all but undecided.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from k2lite.backend_check import EXPERT_CHOICES, TRUNK_CHOICES
from k2lite.backends.base import Backend, Capabilities
from k2lite.demo_checkpoint import DEMO_CONFIG, write_random_model
from k2lite.engine import Chunk, Engine
from k2lite.loading import load

from . import oracle
from .case import Case, Measured, demand
from .float64_backend import Float64Backend
from .oracle import Judged

# Rows of a multiple of 128 wherever a matrix has its inputs, so that every format can store it.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
}
PROMPT = [256, *b"any chunk"]
NEW_TOKENS = 5
# How much two layers may make of one matrix product's error.
MODEL_GROWTH = 30.0


def cases() -> Iterator[Case]:
    yield Case("model", "the same twice, cold and warm", _same_twice, has_formats)
    yield Case("model", "in chunks and beside others", _in_chunks, _is_invariant)
    yield Case("model", "logits", _logits, has_formats)
    yield Case("model", "tokens", _tokens, has_formats)


def chosen_formats(can: Capabilities) -> tuple[str, str] | None:
    """Of the experts and of the trunk; None if the table has not even plain numbers for what is kept plain."""
    experts = [name for name in EXPERT_CHOICES if name in can.formats_of(experts=True)]
    trunk = [name for name in TRUNK_CHOICES if name in can.formats]
    return (experts[0], trunk[0]) if experts and trunk and {"bf16", "f32"} <= can.formats else None


def has_formats(can: Capabilities) -> bool:
    most = can.max_experts
    return chosen_formats(can) is not None and (most is None or most >= SIZES["n_routed_experts"])


def _is_invariant(can: Capabilities) -> bool:
    return has_formats(can) and can.numerics.batch_invariant


@contextmanager
def random_folder(backend: Backend) -> Iterator[Path]:
    formats = chosen_formats(backend.capabilities())
    if formats is None:
        raise ValueError("the table has no formats for a model")
    with tempfile.TemporaryDirectory(prefix="k2lite-") as parent:
        folder = Path(parent) / "model"
        write_random_model(folder, {**DEMO_CONFIG, **SIZES}, experts=formats[0], trunk=formats[1], seed=3)
        yield folder


def _engine(folder: Path, backend: Backend) -> Engine:
    return load(folder, backend=backend, context=128)


def _same_twice(backend: Backend) -> None:
    with random_folder(backend) as folder:
        engine = _engine(folder, backend)
        cold, warm = engine.logits(PROMPT), engine.logits(PROMPT)
        demand(bool(cold.isfinite().all()), "logits that are not finite")
        demand(torch.equal(cold, warm), "other bits once the experts are there")
        demand(torch.equal(cold, _engine(folder, backend).logits(PROMPT)), "other bits in a second engine")


def _in_chunks(backend: Backend) -> None:
    with random_folder(backend) as folder:
        engine = _engine(folder, backend)
        whole = engine.logits(PROMPT)
        for size in (1, 5):
            with engine.open(len(PROMPT)) as sequence:
                parts = [
                    engine.step([Chunk(sequence, PROMPT[at : at + size], "all")])[0]
                    for at in range(0, len(PROMPT), size)
                ]
            demand(torch.equal(torch.cat(parts), whole), f"other bits in chunks of {size}")
        with engine.open(len(PROMPT)) as one, engine.open(5) as other:
            beside = engine.step([Chunk(other, PROMPT[3:8], "all"), Chunk(one, PROMPT, "all")])[1]
        demand(torch.equal(beside, whole), "other bits beside another sequence")


def _logits(backend: Backend) -> Measured:
    """The median over the prompt's tokens: where two experts are all but equal, rounding may choose the other one."""
    with random_folder(backend) as folder:
        found = _engine(folder, backend).logits(PROMPT).cpu()
        expected = oracle.exact(_engine(folder, Float64Backend()).logits(PROMPT))
    errors = [
        oracle.relative_error(found[row : row + 1], Judged(expected[row : row + 1], expected[row : row + 1]))
        for row in range(len(PROMPT))
    ]
    demand(max(errors) < 0.5, f"a token's logits are off by {max(errors):.2g}")
    return Measured(sorted(errors)[len(errors) // 2], _bound(backend))


def _tokens(backend: Backend) -> Measured:
    """Greedy tokens. At the first that differs, how much less than its best token float64 liked the one that came."""
    with random_folder(backend) as folder:
        found = list(map(int, _engine(folder, backend).generate(PROMPT, max_tokens=NEW_TOKENS, temperature=0)))
        judge = _engine(folder, Float64Backend())
        expected = list(map(int, judge.generate(PROMPT, max_tokens=NEW_TOKENS, temperature=0)))
        if found == expected:
            return Measured(0.0, _bound(backend))
        place = next(at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1])
        logits = judge.logits([*PROMPT, *expected[:place]])[-1]
    gap = float((logits[expected[place]] - logits[found[place]]) / logits.square().mean().sqrt())
    return Measured(gap, _bound(backend))


def _bound(backend: Backend) -> float:
    numerics = backend.capabilities().numerics
    return MODEL_GROWTH * max(numerics.linear_error, numerics.vector_error)
