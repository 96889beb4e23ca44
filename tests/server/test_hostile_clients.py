"""Malformed, oversize, slow, half-closed and hostile requests over loopback: every reply is judged, nothing grows."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import psutil
import pytest

from k2lite.engine import Engine
from k2lite.server.service import Limits, Service
from tests.samples import examples
from tests.server.conftest import served
from tests.server.test_staying_up import soon
from tests.server.tools import CLAUDE_TOOL, TOOL, UNITS

AT_ONCE = 32
PATIENCE_S = 60
BODY_LIMIT = 1 << 20
LONGEST = 24
HEAD_S = "k2lite.server.listening.HEAD_S"
KINDS = ("half-closed", "reset", "dribbled", "oversize", "misplaced", "long head", "confused")
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": UNITS, "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto", "stop": ["x"]},
    "/v1/completions": {"prompt": "Once", "max_tokens": 2, "temperature": 1.0, "seed": 1},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 2, "instructions": "Be brief."},
    "/v1/messages": {"messages": UNITS, "max_tokens": 2, "tools": [CLAUDE_TOOL], "system": "Be brief."},
    "/v1/messages/count_tokens": {"messages": UNITS, "tools": [CLAUDE_TOOL]},
}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 70,
    1e308,
    "",
    "x" * 5000,
    "\0<|im_end|>",
    [],
    [[]],
    {},
    {"": {}},
    [None],
    "none",
]


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers end early, whatever length a damaged request asks for."""
    real = Engine.check_request
    monkeypatch.setattr(Engine, "check_request", lambda self, have, want: min(real(self, have, want), LONGEST))


@pytest.fixture
def hasty(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Service]]:
    """A server that waits for nobody."""
    monkeypatch.setattr(HEAD_S, 0.3)
    with served(tiny_engine, limits=Limits(queue=8 * AT_ONCE, body_s=0.3)) as server:
        yield server


def raw(path: str, body: bytes, *, method: str = "POST", length: int | None = None, more: bytes = b"") -> bytes:
    size = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n"
    return head.encode() + more + b"\r\n" + body


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, lost or added, and perhaps cut."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(changed))
        changed[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    return bytes(changed[: rng.randint(1, len(changed))] if rng.random() < 0.3 else changed)


def confused(rng: random.Random, value: Any) -> Any:
    """The same value with something of the wrong type, size or shape somewhere; lengths stay as they are."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        return value if name.startswith("max_") else {**value, name: confused(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], confused(rng, value[at]), *value[at + 1 :]]
    return rng.choice(ODD)


async def told(address: str, data: bytes, *, piece: int = 0, half_close: bool = False, slam: bool = False) -> bytes:
    """All that the server says until it closes. Sent in pieces if asked for, then half-closed or cut with a reset."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), PATIENCE_S)
    try:
        for at in range(0, len(data), piece or 1 << 30):
            writer.write(data[at : at + (piece or 1 << 30)])
            await writer.drain()
            await asyncio.sleep(0)
        if slam:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        if half_close:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def status_of(reply: bytes, path: str | None) -> int:
    """0 for a connection that was closed without a word. An error has the shape of the path's API, if that is known."""
    if not reply:
        return 0
    head, _, body = reply.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status >= 400 and b"application/json" in head:
        error = json.loads(body)["error"]
        assert error["message"]
        assert error["type"]
        assert path is None or (json.loads(body).get("type") == "error") == path.startswith("/v1/messages")
    return status


async def strange(rng: random.Random, kind: str, address: str) -> tuple[str, int]:
    """One request with something wrong: the status of the reply, which must be among those meant for it."""
    path = rng.choice(list(BODIES))
    body = json.dumps({**BODIES[path], "stream": rng.random() < 0.3}).encode()
    good = raw(path, body)
    if kind == "damaged":
        reply = await told(address, damaged(rng, good), piece=rng.choice((0, 7)))
        status, meant = status_of(reply, None), {0, 200, 400, 404, 405, 408, 413, 429}
    elif kind == "half-closed":
        reply = await told(address, good[: rng.randint(1, len(good))], half_close=True)
        status, meant = status_of(reply, path), {0, 200, 400}
    elif kind == "reset":
        status, meant = status_of(await told(address, good[: rng.randint(1, len(good))], slam=True), path), {0}
    elif kind == "dribbled":
        status, meant = status_of(await told(address, good, piece=rng.choice((1, 3, 50))), path), {200}
    elif kind == "oversize":
        status, meant = status_of(await told(address, raw(path, b" " * (BODY_LIMIT + 1))), path), {0, 413}
    elif kind == "misplaced":
        other = rng.choice(("/v1/nothing", "/", "/v1/chat/completions/", "/../etc/passwd", "/health"))
        method = rng.choice(("PUT", "PATCH", "DELETE", "POST"))
        status, meant = status_of(await told(address, raw(other, body, method=method)), other), {307, 404, 405}
    elif kind == "long head":
        size = rng.choice((100_000, 600_000))  # what comes in one piece of up to 256 KiB may be taken
        reply = await told(address, raw(path, body, more=b"X: " + b"y" * size + b"\r\n"))
        status, meant = status_of(reply, path), {0, 400, 431, 200 if size < 1 << 18 else 400}
    else:
        data = raw(path, json.dumps(confused(rng, BODIES[path])).encode())
        status, meant = status_of(await told(address, data), path), {200, 400}
    assert status in meant, (kind, status, good)
    return kind, status


async def crowd(rng: random.Random, count: int, kinds: Sequence[str], address: str) -> Counter[tuple[str, int]]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> tuple[str, int]:
        async with turn:
            mine = random.Random(seed)
            return await strange(mine, mine.choice(kinds), address)

    return Counter(await asyncio.gather(*(one(rng.getrandbits(64)) for _ in range(count))))


@pytest.mark.usefixtures("short_answers")
def test_every_reply_is_meant_and_nothing_grows(
    tiny_engine: Engine,
    hasty: tuple[str, Service],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(9)
    me = psutil.Process()
    with served(tiny_engine, limits=Limits(queue=8 * AT_ONCE, max_body_bytes=BODY_LIMIT)) as (address, service):

        def come(count: int) -> Counter[tuple[str, int]]:
            """To one server after the other, since they share an engine; what is damaged may never end."""
            monkeypatch.setattr(HEAD_S, 0.3)
            replies = asyncio.run(crowd(rng, count // 5, ["damaged"], hasty[0]))
            assert soon(lambda: idle(hasty[1]))
            monkeypatch.setattr(HEAD_S, PATIENCE_S)
            replies += asyncio.run(crowd(rng, count - count // 5, KINDS, address))
            assert soon(lambda: idle(service))
            return replies

        come(100)  # pools and caches fill
        descriptors, memory = len(os.listdir("/proc/self/fd")), me.memory_info().rss
        threads = threading.active_count()
        replies = come(examples(500))
        assert soon(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
        assert threading.active_count() <= threads + 2 * 40  # a pool of 40 each, whatever the count of requests
        assert me.memory_info().rss < memory + (64 << 20)
        assert httpx.get(f"{address}/ready").status_code == 200
    print(sorted(replies.items()))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    answered = sum(count for (_, status), count in replies.items() if status)
    assert answered > examples(500) // 2
    assert {status for _, status in replies} >= {200, 400, 404, 405, 413}


def idle(service: Service) -> bool:
    return service.scheduler.running + service.scheduler.waiting == 0


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comple", raw("/health", b"", method="GET")[:-2]])
def test_a_head_that_never_ends_is_given_up(hasty: tuple[str, Service], sent: bytes) -> None:
    assert asyncio.run(told(hasty[0], sent)) == b""


def test_a_body_that_never_ends_is_a_408(hasty: tuple[str, Service]) -> None:
    reply = asyncio.run(told(hasty[0], raw("/v1/messages", b'{"max_tokens": 3', length=99)))
    assert status_of(reply, "/v1/messages") == 408
    assert idle(hasty[1])


def test_too_many_connections_are_turned_away_until_some_end(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2lite.server.listening.CONNECTIONS", 8)
    with served(tiny_engine) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(8)]
        assert soon(lambda: httpx.get(f"{address}/health").status_code == 503)
        for connection in silent:
            connection.close()
        assert soon(lambda: httpx.get(f"{address}/health").status_code == 200)
