"""Responses through the official openai package, as Codex uses it."""

from __future__ import annotations

import json
from typing import Any

import openai

from tests.server.tools import ARGUMENTS, QUESTION, SCHEMA, UNITS

TOOL: Any = {"type": "function", "name": "send_letter", "description": "Send a letter.", "parameters": SCHEMA}


def ask(client: openai.OpenAI, given: Any, **more: Any) -> Any:
    return client.responses.create(model="kimi", input=given, **{"temperature": 0, "max_output_tokens": 60, **more})


def test_an_answer_streamed_is_the_answer_whole(client: openai.OpenAI) -> None:
    assert ask(client, UNITS[0]["content"]).output_text == "1200 centimeters."
    events = list(ask(client, UNITS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "1200 centimeters."
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == "1200 centimeters."


def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI) -> None:
    events = list(ask(client, QUESTION, tools=[TOOL], stream=True))
    (call,) = events[-1].response.output
    assert (call.type, json.loads(call.arguments)) == ("function_call", ARGUMENTS)
    back = {"type": "function_call", "call_id": "c1", "name": call.name, "arguments": call.arguments}
    result = {"type": "function_call_output", "call_id": "c1", "output": '{"total": 51}'}
    assert ask(client, [*QUESTION, back, result], tools=[TOOL]).output_text == "Done. The total is 51."


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    response = ask(client, UNITS, max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
