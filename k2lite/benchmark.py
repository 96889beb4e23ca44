"""Measures a loaded engine: prefill, then decode, with what was read, and the bound that memory and drive set.

The bound of a decode step is (missing bytes / the store's own rate + trunk bytes / the memory's rate), all measured in
the same run. Knows no terminal.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from k2lite.quant.errors import RequestError

from .engine import Chunk, Engine


@dataclass(frozen=True)
class Phase:
    """One phase of a run. Bytes are those read from the drive; `read_s` is when something was being read."""

    tokens: int
    seconds: float
    requested_experts: int
    hit_experts: int
    read_bytes: int
    read_s: float
    wait_s: float

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hit_experts / self.requested_experts if self.requested_experts else 0.0


@dataclass(frozen=True)
class Rates:
    """Bytes a second, measured in the same run."""

    drive: float
    memory: float


def bench(engine: Engine, prompt: Sequence[int], decode_tokens: int) -> tuple[Phase, Phase]:
    """Read `prompt`, then write `decode_tokens` tokens, each the likeliest. Raises RequestError, ContextLengthError."""
    if decode_tokens < 1 or not prompt:
        raise RequestError("a benchmark takes one prompt token and one new token or more")
    with engine.open(len(prompt) + decode_tokens) as sequence:
        before = snapshot(engine)
        logits = engine.prefill(sequence, prompt)
        prefill = phase(engine, before, len(prompt))
        before = snapshot(engine)
        for _ in range(decode_tokens):
            (rows,) = engine.step([Chunk(sequence, [int(logits.argmax())])])
            logits = rows[0]
        return prefill, phase(engine, before, decode_tokens)


def snapshot(engine: Engine) -> tuple[float, dict[str, Any]]:
    """The clock and the counters, for `phase`."""
    return time.perf_counter(), asdict(engine.experts.counters)


def phase(engine: Engine, before: tuple[float, dict[str, Any]], tokens: int) -> Phase:
    """What was done since `before`, in which `tokens` went through."""
    now, counters = snapshot(engine)
    began, old = before
    names = ("requested_experts", "hit_experts", "read_bytes", "read_s", "wait_s")
    return Phase(tokens, now - began, **{name: counters[name] - old[name] for name in names})


def report(engine: Engine, prefill: Phase, decode: Phase, rates: Rates, trunk_read_bytes: int) -> dict[str, Any]:
    """What --json prints: speeds in tokens/s, rates in bytes/s, shares of 1."""
    bound_s = (decode.read_bytes and decode.read_bytes / decode.tokens / rates.drive) + trunk_read_bytes / rates.memory
    return {
        "prefill": _facts(prefill),
        "decode": _facts(decode) | {"bound_tok_s": 1 / bound_s, "share_of_bound": decode.tok_s * bound_s},
        "prefetch": asdict(engine.experts.counters)["prefetch"],
        "drive_bytes_per_s": rates.drive,
        "memory_bytes_per_s": rates.memory,
        "trunk_read_bytes": trunk_read_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "planned_bytes": engine.placement.total_bytes,
        "plan": asdict(engine.placement),
    }


def _facts(phase: Phase) -> dict[str, Any]:
    return asdict(phase) | {
        "tok_s": phase.tok_s,
        "hit_rate": phase.hit_rate,
        "read_bytes_per_token": phase.read_bytes / phase.tokens,
        "read_bytes_per_s": phase.read_bytes / phase.read_s if phase.read_s else 0.0,
    }


def peak_rss_bytes() -> int:
    """The most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
