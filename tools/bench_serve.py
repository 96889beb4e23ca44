"""Measures `k2lite serve` on the demo model: tool calls, cost a token beside the engine's step, and reused prefixes.

Prints what each part found; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import uvicorn

import k2lite
from k2lite import sampling
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.engine import Chunk, Engine
from k2lite.sampling import sample
from k2lite.server.app import Server
from k2lite.server.fields import Fields
from k2lite.server.listening import config, listen
from k2lite.server.openai_chat import ChatWriter, read_request
from k2lite.server.prefix_store import PrefixStore
from k2lite.server.service import Limits, Service
from tools.tool_requests import ToolRequest, judged, tool_request

STREAMS = (1, 8)
CONTEXT = 4096
PREFIX_TOKENS = 2000
LOOP = "bench-serve-loop"  # the thread of the event loop
LETTER = {
    "type": "function",
    "function": {
        "name": "send_letter",
        "description": "Send a letter.",
        "parameters": {
            "type": "object",
            "properties": {"lines": {"type": "array", "items": {"type": "string"}, "minItems": 20}},
            "required": ["lines"],
        },
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("calls", "cost", "prefix"))
    parser.add_argument("--requests", type=int, default=200, help="with tools (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of these (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=192, help="of an answer whose cost is measured")
    parser.add_argument("--runs", type=int, default=5, help="of each time that is measured")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with k2lite.load(DEMO_FOLDER, context=CONTEXT) as engine:
        if args.only in (None, "calls"):
            found["calls"] = calls(engine, args.requests, args.temperature)
        engine.stop_ids = frozenset()  # from here on answers are as long as they may be
        if args.only in (None, "cost"):
            found["cost"] = [
                cost(engine, streams, kind, args.tokens, args.runs) for kind in ("text", "call") for streams in STREAMS
            ]
        if args.only in (None, "prefix"):
            found["prefix"] = prefix(engine, args.runs)
    print(json.dumps(found))
    return 0


def calls(engine: Engine, count: int, temperature: float) -> dict[str, Any]:
    """K2-Vendor-Verifier's figures of the same requests, constrained and not, tool_choice auto."""
    rng = random.Random(0)
    asked = [tool_request(rng) for _ in range(count)]
    for request in asked:
        request.body["temperature"] = temperature
    found = {}
    for name in ("constrained", "unconstrained"):
        choices = asyncio.run(_choices(engine, asked, constrained=name == "constrained"))
        found[name] = asdict(judged(asked, choices))
        print(f"{name:<13} {found[name]}", flush=True)
    return found


async def _choices(engine: Engine, asked: list[ToolRequest], *, constrained: bool) -> list[dict[str, Any]]:
    service = Service(engine, name="kimi", limits=Limits(slots=8))
    service.scheduler.start()
    turn = asyncio.Semaphore(8)

    async def choice(body: dict[str, Any]) -> dict[str, Any]:
        prepared = service.prepare(*read_request(Fields(body, ""), service.limits))
        if not constrained:
            prepared = replace(prepared, constraint=None)
        async with turn, service.answer(prepared) as answer:
            whole = await ChatWriter(service).whole(answer)
        made: dict[str, Any] = whole["choices"][0]
        return made

    try:
        return await asyncio.gather(*(choice(request.body) for request in asked))
    finally:
        service.scheduler.close()


def cost(engine: Engine, streams: int, kind: str, tokens: int, runs: int) -> dict[str, Any]:
    """What serving adds to a token and stream: the median time from a step to the next, less that of the same steps and
    draws alone; and what it takes by itself: a client's time where steps take none, and CPU time of the two threads
    that serve, behind real steps."""
    body = {
        "messages": [{"role": "user", "content": "Write to everybody."}],
        "tools": [LETTER],
        "tool_choice": "required" if kind == "call" else "auto",
        "max_tokens": tokens,
        "stream": True,
        "seed": 1,
    }
    found: dict[str, list[float]] = {"added_us": [], "free_us": [], "cpu_us": []}
    limits = Limits(slots=streams, kept_prefixes=streams)
    client = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with client, served(engine, limits) as (port, _):
        for _ in range(runs + 1):
            with _Watched(engine, streams) as watched:
                client.submit(stream_all, port, "/v1/chat/completions", [body] * streams).result()
            found["added_us"].append((watched.interval_s() - watched.again_s()) / streams * 1e6)
            found["cpu_us"].append(watched.cpu_s / watched.tokens * 1e6)
            bodies = [{**body, "max_tokens": 5 * tokens}] * streams
            with _Watched(engine, streams, free=True) as watched:
                span = client.submit(stream_all, port, "/v1/chat/completions", bodies).result()
            found["free_us"].append((span - watched.draws_s) / watched.tokens * 1e6)
    # the first run compiles and fills caches
    middle = {name: statistics.median(values[1:]) for name, values in found.items()}
    spread = {name: f"{min(values[1:]):.0f} to {max(values[1:]):.0f}" for name, values in found.items()}
    print(
        f"{kind}, {streams} streams, a token and stream: adds {middle['added_us']:.0f} us ({spread['added_us']}); "
        f"{middle['free_us']:.0f} us ({spread['free_us']}) where steps take no time; "
        f"CPU {middle['cpu_us']:.0f} us ({spread['cpu_us']}) behind real ones",
        flush=True,
    )
    return {"kind": kind, "streams": streams, **middle}


class _Watched:
    """While entered, from the first step in which nobody reads a prompt and all are there: `tokens` fed, `draws_s` of
    free draws, `cpu_s` of the scheduler's thread outside steps and free draws and of the event loop's. `free` steps
    take no time: logits are drawn before."""

    def __init__(self, engine: Engine, streams: int, *, free: bool = False) -> None:
        self.cpu_s, self.draws_s = 0.0, 0.0
        self._engine, self._streams, self._apart_s = engine, streams, 0.0
        self._prompts: dict[int, list[int]] = {}  # by the sequence's identity
        self._steps: list[dict[int, list[int]]] = []
        self._begins: list[float] = []
        self._logits = 3 * torch.randn(97, 1, engine.config.vocab_size) if free else None
        names = ("k2lite-scheduler", LOOP)
        threads = [thread.ident for thread in threading.enumerate() if thread.name in names]
        self._clocks = [time.pthread_getcpuclockid(ident) for ident in threads if ident is not None]

    def __enter__(self) -> _Watched:
        self._engine.step = self._step  # type: ignore[method-assign]
        sampling.sample = self._sample
        return self

    def __exit__(self, *_: object) -> None:
        del self._engine.step
        sampling.sample = sample
        self.cpu_s += self._now() - self._apart_s

    @property
    def tokens(self) -> int:
        return sum(map(len, self._steps))

    def interval_s(self) -> float:
        """Median time from the beginning of a step to the next one's."""
        return _median_interval(self._begins)

    def again_s(self) -> float:
        """The same of the same steps without a server, each token drawn."""
        sequences = {key: self._engine.open() for key in self._prompts}
        for key, ids in self._prompts.items():
            self._engine.prefill(sequences[key], ids)
        begins = []
        for at, step in enumerate(self._steps):
            begins.append(time.perf_counter())
            for logits in self._engine.step([Chunk(sequences[key], ids) for key, ids in step.items()]):
                sample(logits[0], self._engine.recommended_sampling, at)
        for sequence in sequences.values():
            sequence.close()
        return _median_interval(begins)

    def _step(self, chunks: Sequence[Chunk]) -> Sequence[torch.Tensor]:
        decodes = all(len(chunk.ids) == 1 for chunk in chunks)
        if not self._prompts and decodes and len(chunks) == self._streams:
            self._prompts = {id(chunk.sequence): list(chunk.sequence.ids) for chunk in chunks}
            self.cpu_s, self._apart_s, self.draws_s = -self._now(), 0.0, 0.0
        if self._prompts:
            self._steps.append({id(chunk.sequence): list(chunk.ids) for chunk in chunks})
            self._begins.append(time.perf_counter())
        if self._logits is None or not decodes:
            return self._apart(type(self._engine).step, self._engine, chunks)
        for chunk in chunks:
            chunk.sequence.cache.advance(len(chunk.ids))
            chunk.sequence.ids.extend(chunk.ids)
        return [self._logits[len(chunk.sequence.ids) % 97] for chunk in chunks]

    def _sample(self, *args: Any) -> Any:
        if len(args) > 3:
            return sample(*args)  # a draw under a mask is the grammar's
        began = time.perf_counter()
        token = self._apart(sample, *args)
        self.draws_s += time.perf_counter() - began
        return token

    def _apart(self, act: Callable[..., Any], *args: Any) -> Any:
        began = time.thread_time()
        try:
            return act(*args)
        finally:
            self._apart_s += time.thread_time() - began

    def _now(self) -> float:
        return sum(time.clock_gettime(clock) for clock in self._clocks)


def _median_interval(times: Sequence[float]) -> float:
    return statistics.median(later - sooner for sooner, later in pairwise(times))


def stream_all(port: int, path: str, bodies: list[dict[str, Any]]) -> float:
    """In a process of its own: ask everything at once; seconds from when all have begun to the last one's end."""
    begun, ends = [0.0] * len(bodies), [0.0] * len(bodies)

    def one(at: int) -> None:
        begun[at], ends[at] = stream_one(port, path, bodies[at])

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(ends) - statistics.median(begun)


def stream_one(port: int, path: str, body: dict[str, Any]) -> tuple[float, float]:
    """When the first token and the end of a streamed answer came."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    received, first = b"", 0.0
    # the first event of a chat tells the role only
    wanted = 2 if path.endswith("chat/completions") else 1
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + data)
        while piece := connection.recv(1 << 16):
            if not first:
                received += piece
                first = time.perf_counter() if received.count(b"data: {") >= wanted else 0.0
    if not received.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(received.decode())
    return first, time.perf_counter()


def prefix(engine: Engine, runs: int) -> dict[str, Any]:
    """Time to the first token behind PREFIX_TOKENS: new, in memory, and on the drive after a restart."""
    rng = random.Random(0)
    words = list(range(65, 91))
    times: dict[str, list[float]] = {"uncached": [], "memory": [], "drive": []}
    for run in range(runs + 1):
        begin = rng.choices(words, k=PREFIX_TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            for places in (("uncached", "memory"), ("drive",)):
                store = PrefixStore(Path(folder), engine, limit_bytes=1 << 32)
                with served(engine, Limits(), store) as (port, _):
                    for place in places:
                        body = {"prompt": begin + rng.choices(words, k=16), "max_tokens": 1, "stream": True}
                        began = time.perf_counter()
                        first, _ = stream_one(port, "/v1/completions", body)
                        if run:
                            times[place].append(first - began)
    median = {place: statistics.median(seconds) for place, seconds in times.items()}
    for place, seconds in median.items():
        times_sooner = median["uncached"] / seconds
        print(
            f"first token after {PREFIX_TOKENS}: {place:<8} {seconds * 1e3:7.1f} ms ({times_sooner:.1f} times sooner)"
        )
    return median


@contextmanager
def served(engine: Engine, limits: Limits, store: PrefixStore | None = None) -> Iterator[tuple[int, Service]]:
    """The port of a server in a thread of this process, and its service."""
    service = Service(engine, name="kimi", limits=limits, store=store)
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(config(Server(service).app()))
    thread = threading.Thread(target=server.run, name=LOOP, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listening.getsockname()[1], service
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


if __name__ == "__main__":
    sys.exit(main())
