"""Chat completions through the official openai package: streams, tools, forms, errors."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.server.tools import ARGUMENTS, QUESTION, SCHEMA, TOOL, UNITS


def ask(client: openai.OpenAI, messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(
        model="kimi", messages=messages, **{"temperature": 0, "max_tokens": 60, **more}
    )


def test_an_answer_streamed_is_the_answer_whole(client: openai.OpenAI) -> None:
    whole = ask(client, UNITS)
    chunks = list(ask(client, UNITS, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content == "1200 centimeters."
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "stop"
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # asked before


def test_models_names_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["kimi"]


def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI) -> None:
    first = ask(client, QUESTION, tools=[TOOL])
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [ARGUMENTS]
    assert message.tool_calls[0].id == "functions.send_letter:0"
    back = message.model_dump(exclude_none=True)
    back["tool_calls"][0]["id"] = "call_of_the_clients_own"
    result = {"role": "tool", "tool_call_id": "call_of_the_clients_own", "content": '{"total": 51}'}
    second = ask(client, [*QUESTION, back, result], tools=[TOOL])
    assert second.choices[0].message.content == "Done. The total is 51."


def test_a_streamed_call_comes_in_pieces(client: openai.OpenAI) -> None:
    deltas = [chunk.choices[0].delta for chunk in ask(client, QUESTION, tools=[TOOL], stream=True)]
    assert not any(delta.content and delta.tool_calls for delta in deltas)
    pieces = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert (pieces[0].index, pieces[0].id, pieces[0].function.name) == (0, "functions.send_letter:0", "send_letter")
    assert json.loads("".join(piece.function.arguments for piece in pieces)) == ARGUMENTS


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "send_letter"}}])
def test_a_forced_call_is_made_and_valid(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(client, [{"role": "user", "content": "Hi"}], tools=[TOOL], tool_choice=choice, temperature=2, seed=3)
    calls = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_no_call_where_none_may_be_made(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTION, tools=[TOOL], tool_choice="none", max_tokens=20)
    assert answer.choices[0].message.tool_calls is None
    assert "tool_call" not in answer.choices[0].message.content


def test_an_answer_satisfies_its_schema_even_when_it_is_cut_short(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "letter", "schema": SCHEMA}}
    for limit in (24, 28):
        answer = ask(client, UNITS, response_format=form, temperature=3, seed=limit, max_tokens=limit)
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    answer = ask(client, UNITS, response_format={"type": "json_object"}, temperature=3, seed=1, max_tokens=8)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_seed_decides_and_logprobs_come(client: openai.OpenAI) -> None:
    once, again = (
        ask(client, UNITS, temperature=1.5, seed=5, max_tokens=8, logprobs=True, top_logprobs=2) for _ in range(2)
    )
    assert once.choices[0].message.content == again.choices[0].message.content
    content = once.choices[0].logprobs.content
    assert len(content) >= once.usage.completion_tokens - 1  # the end of the turn has no text
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    answer = ask(client, UNITS, stop=["centi"])
    assert answer.choices[0].message.content == "1200 "
    assert answer.choices[0].finish_reason == "stop"


def test_completions_go_on_without_a_template(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="kimi", prompt="Once upon", max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "length")
    pieces = client.completions.create(model="kimi", prompt="Once upon", max_tokens=4, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "max_tokens": 3}, "max_tokens"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"max_tokens": 100_000}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": ""}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_mistake_is_a_400_that_names_the_parameter(client: openai.OpenAI, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{"messages": UNITS, **more})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_unknown_fields_are_ignored(client: openai.OpenAI) -> None:
    answer = ask(client, UNITS, extra_body={"prompt_cache_key": "x", "thinking": {"type": "enabled"}, "what": [1]})
    assert answer.choices[0].message.content == "1200 centimeters."
