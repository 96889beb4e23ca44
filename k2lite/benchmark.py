"""Measures a loaded engine: prefill, then decode, with what was read and sent, and the bound that the ways set.

The bound of a decode step is (missing bytes / the store's own rate + trunk bytes / the memory's rate), all measured in
the same run. With an accelerator the trunk comes from its memory, and after it the drive, the link, and what multiplies
experts there and on the host work beside one another, so the slowest of these counts. Knows no terminal.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from k2lite.backends.forwarding import ForwardingBackend
from k2lite.backends.torch_device.backend import TorchDeviceBackend
from k2lite.offload.drive_rate import store_rate
from k2lite.quant.errors import RequestError

from .device_rates import measure_memory_and_link
from .engine import Chunk, Engine
from .machine import measure_memory
from .placement import Placement
from .prediction import engine_cache


@dataclass(frozen=True)
class Phase:
    """One phase of a run. `read_bytes` came from the drive; `read_s` is when something was being read. Of the hits,
    `device_hit_experts` lay on an accelerator; `sent_bytes` of experts went there, `returned_bytes` came back."""

    tokens: int
    seconds: float
    requested_experts: int
    hit_experts: int
    read_bytes: int
    read_s: float
    wait_s: float
    device_hit_experts: int = 0
    sent_bytes: int = 0
    returned_bytes: int = 0

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hit_experts / self.requested_experts if self.requested_experts else 0.0

    @property
    def device_hit_rate(self) -> float:
        return self.device_hit_experts / self.requested_experts if self.requested_experts else 0.0


@dataclass(frozen=True)
class Rates:
    """Bytes a second, measured in the same run; 0 of an accelerator's memory and of the way there if there is none."""

    drive: float
    memory: float
    device: float = 0.0
    link: float = 0.0


def measure_rates(engine: Engine) -> Rates:
    """Of the drives that hold the experts, of memory, and of the accelerator if the plan has one."""
    drive, memory = store_rate(engine_cache(engine).store), measure_memory()
    if engine.placement.device is None:
        return Rates(drive, memory)
    backend = engine.backend
    while isinstance(backend, ForwardingBackend):
        backend = backend.inner
    if not isinstance(backend, TorchDeviceBackend):
        raise TypeError(f"the plan has an accelerator, and {backend.name} is none")
    return Rates(drive, memory, *measure_memory_and_link(backend))


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
    there = {name: counters["device"][name] - old["device"][name] for name in counters["device"]}
    return Phase(
        tokens,
        now - began,
        **{name: counters[name] - old[name] for name in names},
        device_hit_experts=there["hit_experts"],
        sent_bytes=there["sent_bytes"],
        returned_bytes=there["returned_bytes"],
    )


def report(engine: Engine, prefill: Phase, decode: Phase, rates: Rates, trunk_read_bytes: int) -> dict[str, Any]:
    """What --json prints: speeds in tokens/s, rates in bytes/s, shares of 1, parts of the bound in s a token."""
    parts = bound_parts(engine.placement, decode, rates, trunk_read_bytes)
    after_trunk = [seconds for name, seconds in parts.items() if name != "trunk"]
    bound_s = parts["trunk"] + max(after_trunk)
    return {
        "prefill": _facts(prefill),
        "decode": _facts(decode)
        | {"bound_tok_s": 1 / bound_s, "share_of_bound": decode.tok_s * bound_s, "bound_s": parts},
        "prefetch": asdict(engine.experts.counters)["prefetch"],
        "drive_bytes_per_s": rates.drive,
        "memory_bytes_per_s": rates.memory,
        "device_bytes_per_s": rates.device,
        "link_bytes_per_s": rates.link,
        "trunk_read_bytes": trunk_read_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "planned_bytes": engine.placement.total_bytes,
        "plan": asdict(engine.placement),
    }


def bound_parts(plan: Placement, decode: Phase, rates: Rates, trunk_read_bytes: int) -> dict[str, float]:
    """Seconds a token, without anything beside the bytes: "trunk", and after it what works side by side."""
    drive_s = decode.read_bytes / decode.tokens / rates.drive if decode.read_bytes else 0.0
    if plan.device is None:
        return {"trunk": trunk_read_bytes / rates.memory, "drive": drive_s}
    asked = decode.requested_experts
    there = {"device": asked, "host": 0, "split": decode.device_hit_experts}[plan.multiply_on]
    expert = plan.experts_bytes / max(1, plan.experts) / decode.tokens
    return {
        "trunk": trunk_read_bytes / rates.device,
        "drive": drive_s,
        "link": decode.sent_bytes / decode.tokens / rates.link,
        "experts_on_device": there * expert / rates.device,
        "experts_on_host": (asked - there) * expert / rates.memory,
    }


def _facts(phase: Phase) -> dict[str, Any]:
    return asdict(phase) | {
        "tok_s": phase.tok_s,
        "hit_rate": phase.hit_rate,
        "device_hit_rate": phase.device_hit_rate,
        "sent_bytes_per_token": phase.sent_bytes / phase.tokens,
        "read_bytes_per_token": phase.read_bytes / phase.tokens,
        "read_bytes_per_s": phase.read_bytes / phase.read_s if phase.read_s else 0.0,
    }


def peak_rss_bytes() -> int:
    """The most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
