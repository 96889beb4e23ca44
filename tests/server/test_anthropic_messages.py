"""Messages and count_tokens through the official anthropic package."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from k2lite.server.anthropic_messages import read_conversation
from k2lite.server.fields import Fields
from k2lite.server.service import Limits
from tests.server.tools import ARGUMENTS, CLAUDE_TOOL, QUESTION, UNITS


def ask(claude: anthropic.Anthropic, messages: Any, **more: Any) -> Any:
    given = {"max_tokens": 60, **more}  # the demo recommends temperature 0, which this package no longer names
    return claude.messages.create(model="kimi", messages=messages, extra_query={"beta": "true"}, **given)


def test_an_answer_streamed_is_the_answer_whole(claude: anthropic.Anthropic) -> None:
    whole = ask(claude, UNITS)
    assert [block.text for block in whole.content] == ["1200 centimeters."]
    assert whole.stop_reason == "end_turn"
    with claude.messages.stream(model="kimi", messages=UNITS, max_tokens=60) as stream:  # type: ignore[arg-type]
        assert "".join(stream.text_stream) == "1200 centimeters."
        final = stream.get_final_message()
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == whole.usage.input_tokens + (
        whole.usage.cache_read_input_tokens or 0
    )


def test_a_tool_is_used_and_its_result_read(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model="kimi",
        messages=QUESTION,
        max_tokens=60,
        tools=[CLAUDE_TOOL],  # type: ignore[arg-type]
    ) as stream:
        events = list(stream)
        message = stream.get_final_message()
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert events[0].message.usage.input_tokens > 10  # type: ignore[union-attr]
    assert kinds[-1] == "message_stop"
    used = message.content[-1]
    assert used.type == "tool_use"
    assert used.input == ARGUMENTS
    assert used.id.replace("_", "").isalnum()
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": '{"total": 51}'}]}
    said = [block.model_dump() for block in message.content]
    history = [*QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    assert ask(claude, history, tools=[CLAUDE_TOOL]).content[0].text == "Done. The total is 51."


def test_any_forces_a_call(claude: anthropic.Anthropic) -> None:
    message = ask(claude, UNITS, tools=[CLAUDE_TOOL], tool_choice={"type": "any"})
    assert message.content[-1].type == "tool_use"
    assert set(message.content[-1].input) == set(ARGUMENTS)


def test_count_tokens_counts_what_a_request_reads(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model="kimi", messages=UNITS, system="Be brief.")  # type: ignore[arg-type]
    usage = ask(claude, UNITS, system="Be brief.", max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_a_changing_billing_header_does_not_defeat_the_prefix(claude: anthropic.Anthropic) -> None:
    def once(stamp: str) -> Any:
        header = f"x-anthropic-billing-header: cc_version=1; cch={stamp};"
        return ask(claude, UNITS, system=[{"type": "text", "text": header}, {"type": "text", "text": "You are Kimi."}])

    once("abcde")
    assert once("54321").usage.input_tokens == 1


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    message = ask(claude, UNITS, stop_sequences=["centi"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "centi")


def test_a_mistake_is_in_the_apis_own_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(claude, [{"role": "king", "content": ""}])
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_blocks_become_messages_in_order() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"ü": 1}}
    body = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, call]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "and now"},
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no", "is_error": True},
                ],
            },
        ]
    }
    messages = read_conversation(Fields(body, ""), Limits()).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
    assert messages[1]["reasoning_content"] == "hm"
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"ü": 1}'
    assert messages[2]["content"] == "Error: no"
