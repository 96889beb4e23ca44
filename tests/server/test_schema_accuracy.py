"""K2-Vendor-Verifier's schema_accuracy over HTTP: whatever the temperature and the choice, every call is valid."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from k2lite.engine import Engine
from k2lite.server.service import Limits
from tests.samples import examples
from tests.server.conftest import served
from tools.tool_requests import ToolRequest, judged, tool_request

STREAMS = 8


def drawn(rng: random.Random) -> ToolRequest:
    """A request as agents send them: mostly auto, at any temperature, streamed or not."""
    request = tool_request(rng)
    names = [tool["function"]["name"] for tool in request.body["tools"]]
    named = {"type": "function", "function": {"name": rng.choice(names)}}
    request.body["tool_choice"] = rng.choices(("auto", "required", named), (70, 20, 10))[0]
    request.body["temperature"] = rng.choice((0, 0.6, 1.0, 2.0))
    request.body["stream"] = rng.random() < 0.5
    return request


async def answered(address: str, asked: list[ToolRequest]) -> list[dict[str, Any]]:
    """The choice of each reply, STREAMS at a time."""
    turn = asyncio.Semaphore(STREAMS)
    async with httpx.AsyncClient(timeout=300) as client:

        async def choice(body: dict[str, Any]) -> dict[str, Any]:
            async with turn:
                reply = await client.post(f"{address}/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            return put_together(reply.text) if body["stream"] else reply.json()["choices"][0]

        return await asyncio.gather(*(choice(request.body) for request in asked))


def put_together(events: str) -> dict[str, Any]:
    """The choice that a stream's chunks make."""
    calls: list[dict[str, Any]] = []
    reason, text = None, ""
    for line in events.splitlines():
        if not line.startswith("data: {"):
            continue
        [choice] = json.loads(line[6:])["choices"]
        reason = choice["finish_reason"] or reason
        text += choice["delta"].get("content") or ""
        for piece in choice["delta"].get("tool_calls", []):
            if piece["index"] == len(calls):
                calls.append({"function": {"name": piece["function"]["name"], "arguments": ""}})
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return {"finish_reason": reason, "message": {"content": text, "tool_calls": calls}}


@pytest.mark.parametrize("weights", ["demo", "random"])
def test_every_call_is_valid(weights: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(f"{weights}_engine")
    rng = random.Random(7)
    asked = [drawn(rng) for _ in range(examples(100 if weights == "demo" else 20))]
    with served(engine, limits=Limits(slots=STREAMS)) as (address, _):
        choices = asyncio.run(answered(address, asked))
    figures = judged(asked, choices)
    print(figures)
    assert figures.schema_accuracy == 1.0
    assert figures.with_calls >= len(asked) // 4
    for sent, choice in zip(asked, choices, strict=True):
        must = sent.body["tool_choice"] != "auto"
        assert choice["finish_reason"] == "tool_calls" or not must
        assert "<|" not in (choice["message"]["content"] or "")
