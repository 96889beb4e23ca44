"""Requests with tools for a server, from the demo's held-out dialogues, and K2-Vendor-Verifier's figures of replies.

Invariant: a seed decides every request. What the dialogue does next stands in for Moonshot's own API, with which the
verifier compares (formats.md 7.7).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

from tools.demo_training.tools_data import tool_dialogue


@dataclass(frozen=True)
class ToolRequest:
    """A body of chat completions, and whether the dialogue goes on with a call."""

    body: dict[str, Any]
    calls: bool


@dataclass(frozen=True)
class Judged:
    """`schema_accuracy`: of the replies that finish with tool_calls, the share whose every call is valid.
    `tool_call_f1`: of finishing with tool_calls, against what the dialogue does."""

    requests: int
    with_calls: int
    schema_accuracy: float
    tool_call_f1: float


def tool_request(rng: random.Random, *, model: str = "kimi") -> ToolRequest:
    """A dialogue of tools never trained on, cut before one of the assistant's turns."""
    dialogue = tool_dialogue(rng, held_out=True)
    turns = [place for place, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    at = rng.choice(turns)
    body = {
        "model": model,
        "messages": dialogue.messages[:at],
        "tools": dialogue.tools,
        "max_tokens": 128,
        "seed": rng.getrandbits(32),
    }
    return ToolRequest(body, "tool_calls" in dialogue.messages[at])


def judged(asked: Sequence[ToolRequest], choices: Sequence[dict[str, Any]]) -> Judged:
    """The figures of the replies' choices, whole or put together from a stream."""
    called = [choice["finish_reason"] == "tool_calls" for choice in choices]
    valid = [
        calls_are_valid(choice["message"]["tool_calls"], request.body["tools"])
        for request, choice, made in zip(asked, choices, called, strict=True)
        if made
    ]
    both = sum(request.calls and made for request, made in zip(asked, called, strict=True))
    positives = sum(called) + sum(request.calls for request in asked)
    return Judged(
        len(asked), len(valid), sum(valid) / len(valid) if valid else 0.0, 2 * both / positives if positives else 0.0
    )


def calls_are_valid(calls: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> bool:
    """Whether each call is of a declared tool, with JSON that satisfies its schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            jsonschema.validate(json.loads(arguments), schemas[name])
        except (KeyError, ValueError, jsonschema.ValidationError):
            return False
    return bool(calls)
