"""Measures one setting in a process of its own: decode against its bound, a prompt against reading its experts once,
memory against the plan. Prints one JSON object.

After each round of steps as many other experts that have no slot either are read by the same store, with nothing
computed beside it: that is the store's own rate. (Not the same ones: a virtual drive's host keeps what was read a
moment ago, and reading it once more was found to be 1.4 times as fast.) The memory's ceiling is that of the trunk's own
matrices, read by the backend's own threads.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from k2lite.backends.cpu.backend import CpuBackend
from k2lite.engine import Chunk, Engine
from k2lite.loading import load
from k2lite.machine import this_machine
from k2lite.model_sizes import EMBEDDINGS
from k2lite.offload.cache import ExpertCache
from k2lite.offload.drive_rate import store_rate
from k2lite.offload.routing_trace import read_trace
from k2lite.offload.store import ExpertRead
from k2lite.placement import WeightBytes
from k2lite.planning import ModelBytes, traced_speeds
from k2lite.quant.types import ExpertKey, QuantTensor
from k2lite.traced_routing import follow_trace
from k2lite.weights import trunk_matrices

from ..memory_read import read_bytes_per_second


@dataclass(frozen=True)
class Setting:
    """`ram_bytes` 0: what the machine and its control group can spare. `chunk_tokens` 0: the planned chunk.
    `prompt_twice`: the prompt that counts is the second one, when all memory has been touched."""

    model: str
    ram_bytes: int = 0
    routing: str = ""
    prompt_tokens: int = 512
    chunk_tokens: int = 0
    warm_up_tokens: int = 24
    rounds: int = 20
    round_tokens: int = 2
    context_tokens: int = 4096
    prefetch: bool = True
    prompt_twice: bool = False


class Watched:
    """A loaded engine and what its store is asked to read."""

    def __init__(self, setting: Setting) -> None:
        self.engine = load(
            setting.model,
            backend="cpu",
            context=setting.context_tokens,
            ram=setting.ram_bytes or None,
            prefetch=setting.prefetch,
        )
        self.trace = read_trace(Path(setting.routing)) if setting.routing else None
        if self.trace is not None:
            follow_trace(self.engine, self.trace)
        cache, backend = self.engine.experts, self.engine.backend
        assert isinstance(cache, ExpertCache)
        assert isinstance(backend, CpuBackend)
        self.cache, self.backend = cache, backend
        self.read: list[ExpertKey] = []
        self._drawn = random.Random(0)
        matrices = trunk_matrices(self.engine._model._trunk, "").values()
        self._trunk = [part for matrix in matrices for part in _parts(matrix)]
        self.trunk_bytes = self.engine.placement.trunk_bytes - cache.store.checkpoint.trunk_module(EMBEDDINGS).nbytes

    def memory_rate(self) -> float:
        """Bytes a second, the best of a few readings."""
        return max(read_bytes_per_second(self.backend, self._trunk) for _ in range(3))

    def drive_rate(self, keys: Sequence[ExpertKey]) -> float:
        return store_rate(self.cache.store, keys=keys, seconds=60.0)

    def predicted(self, chunk_tokens: int) -> dict[str, Any]:
        """What `k2lite plan --routing` says of the engine's placement, with bandwidths measured now."""
        assert self.trace is not None
        config, checkpoint = self.engine.config, self.cache.store.checkpoint
        machine = this_machine(self.engine.placement.budget_bytes, store_rate(self.cache.store), self.engine.backend)
        model = ModelBytes(WeightBytes.of(config, checkpoint), checkpoint.trunk_module(EMBEDDINGS).nbytes)
        speeds = traced_speeds(
            config, model, machine.rates, self.engine.placement, self.trace, chunk_tokens=chunk_tokens
        )
        return {"rates": asdict(machine.rates)} | speeds

    def others(self, count: int) -> list[ExpertKey]:
        """So many experts that have no slot now and were not just read: what a step's misses are, too."""
        just, every = set(self.read), self.cache.store.checkpoint.expert_keys()
        left = [key for key in every if key not in self.cache._table and key not in just]
        return self._drawn.sample(left, min(count, len(left)))

    @contextmanager
    def noting_reads(self) -> Iterator[list[ExpertKey]]:
        """The experts that are read inside the block."""
        keys = self.read = []
        start = self.cache.store.start

        def noted(key: ExpertKey, *args: Any, **options: Any) -> ExpertRead:
            keys.append(key)
            return start(key, *args, **options)

        self.cache.store.start = noted  # type: ignore[method-assign]
        try:
            yield keys
        finally:
            del self.cache.store.start  # type: ignore[method-assign]


def _parts(matrix: QuantTensor) -> list[torch.Tensor]:
    return [part.view(-1).view(torch.uint8) for part in matrix.parts.values() if part.nbytes > 1 << 16]


def measure(setting: Setting) -> dict[str, Any]:
    began = time.perf_counter()
    watched = Watched(setting)
    loaded_s = time.perf_counter() - began
    engine = watched.engine
    chunk = setting.chunk_tokens or engine.placement.prefill_chunk_tokens
    predicted = watched.predicted(chunk) if setting.routing else None
    state = torch.Generator().manual_seed(0)
    ids = torch.randint(engine.config.vocab_size, (setting.prompt_tokens,), generator=state).tolist()
    with engine.open() as sequence:
        first = None
        if setting.prompt_twice:
            _, first = _prompt(watched, sequence, ids, chunk)
            sequence.truncate(0)
        logits, prefill = _prompt(watched, sequence, ids, chunk)
        for _ in range(setting.warm_up_tokens):
            logits = _step(engine, sequence, logits)
        rounds = []
        for _ in range(setting.rounds):
            logits, facts = _round(watched, sequence, logits, setting.round_tokens)
            rounds.append(facts)
    return {
        "setting": asdict(setting),
        "loaded_s": loaded_s,
        "plan": asdict(engine.placement),
        "planned_bytes": engine.placement.total_bytes,
        "predicted": predicted,
        "first_prefill": first,
        "prefill": prefill,
        "rounds": rounds,
        "decode": {name: statistics.median(facts[name] for facts in rounds) for name in rounds[0]},
        "prefetch": asdict(watched.cache.counters.prefetch),
        "memory": memory_use(),
    }


def _step(engine: Engine, sequence: Any, logits: torch.Tensor) -> torch.Tensor:
    (rows,) = engine.step([Chunk(sequence, [int(logits.argmax())])])
    return rows[0]


def _round(watched: Watched, sequence: Any, logits: torch.Tensor, tokens: int) -> tuple[torch.Tensor, dict[str, float]]:
    """A few steps, then what they read and the trunk once more, alone."""
    before, steps = asdict(watched.cache.counters), []
    with watched.noting_reads() as keys:
        for _ in range(tokens):
            began = time.perf_counter()
            logits = _step(watched.engine, sequence, logits)
            steps.append(time.perf_counter() - began)
    after = asdict(watched.cache.counters)
    moved = {name: after[name] - before[name] for name in before if not isinstance(before[name], dict)}
    memory = watched.memory_rate()
    drive = watched.drive_rate(watched.others(len(keys))) if keys else 0.0
    missing = moved["read_bytes"] / tokens
    bound_s = (missing / drive if keys else 0.0) + watched.trunk_bytes / memory
    resident = moved["hit_experts"] * watched.cache.store.checkpoint.expert_bytes / tokens
    step_s = sum(steps) / tokens
    return logits, {
        "step_s": step_s,
        "bound_s": bound_s,
        "ratio": step_s / bound_s,
        # experts that were found in memory are read from there, for which the bound has no term
        "ratio_with_residents": step_s / (bound_s + resident / memory),
        "tok_s": 1 / step_s,
        "hit_rate": moved["hit_experts"] / moved["requested_experts"],
        "missing_bytes": missing,
        "trunk_bytes": watched.trunk_bytes,
        "drive_rate": drive,
        "memory_rate": memory,
        "reading_s": moved["read_s"] / tokens,
        "waiting_s": moved["wait_s"] / tokens,
        "drive_use": moved["read_bytes"] / moved["read_s"] / drive if keys else 0.0,
    }


def _prompt(watched: Watched, sequence: Any, ids: Sequence[int], chunk: int) -> tuple[torch.Tensor, dict[str, float]]:
    engine = watched.engine
    before = asdict(watched.cache.counters)
    began = time.perf_counter()
    with watched.noting_reads() as keys:
        logits = engine.prefill(sequence, ids, chunk_tokens=chunk)
    seconds = time.perf_counter() - began
    after = asdict(watched.cache.counters)
    drive = watched.drive_rate(keys[:120])  # those that were read longest ago, for the reason above
    read = after["read_bytes"] - before["read_bytes"]
    needed = len(set(keys)) * watched.cache.store.checkpoint.expert_bytes
    return logits, {
        "tokens": len(ids),
        "chunk_tokens": chunk,
        "seconds": seconds,
        "tok_s": len(ids) / seconds,
        "read_bytes": read,
        "needed_bytes": needed,
        "drive_rate": drive,
        "reading_alone_s": needed / drive,
        "ratio": seconds / (needed / drive),
        "waiting_s": after["wait_s"] - before["wait_s"],
        "reading_s": after["read_s"] - before["read_s"],
    }


def memory_use() -> dict[str, int]:
    """What this process holds, and the most it ever held, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


if __name__ == "__main__":
    print(json.dumps(measure(Setting(**json.loads(sys.argv[1])))))
