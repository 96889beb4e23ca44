"""Tool calls read out of answers: what the published templates write comes back, whole and in order."""

from __future__ import annotations

import json
from pathlib import Path

from k2lite.text.tokenizer import Tokenizer
from k2lite.text.tool_calls import ToolCall, text_before_calls, tool_calls


def test_the_calls_of_the_golden_renders_come_back(shared: Path) -> None:
    golden = json.loads((shared / "data/derived/chat_render_golden.json").read_text(encoding="utf-8"))
    seen = 0
    for case in golden["renders"]:
        # llama.cpp's own template numbers the ids anew
        if case["error"] or "llama.cpp" in case["template"]:
            continue
        expected = [
            (call["id"], call["function"]["arguments"])
            for message in golden["conversations"][case["case"]]
            for call in message.get("tool_calls") or ()
            if call["id"].startswith("functions.")
        ]
        found = [call for call in tool_calls(case["text"]) if call.id.startswith("functions.")]
        assert [call.id for call in found] == [call_id for call_id, _ in expected], case["case"]
        for call, (call_id, arguments) in zip(found, expected, strict=True):
            assert call.name == call_id.removeprefix("functions.").rpartition(":")[0]
            wanted = json.loads(arguments) if isinstance(arguments, str) else arguments
            assert json.loads(call.arguments) == wanted
        seen += len(found)
    assert seen > 3


def test_what_a_call_becomes_in_the_next_prompt_is_what_was_read(byte_tokenizer: Tokenizer) -> None:
    calls = [ToolCall("functions.a_b:0", "a_b", '{"x": "<|im_end|>"}'), ToolCall("functions.c.d-e:1", "c.d-e", "")]
    message = {"role": "assistant", "content": "Wait.", "tool_calls": [call.as_message_part() for call in calls]}
    text = byte_tokenizer.render([message], add_generation_prompt=False).text
    said = text.partition("<|im_assistant|>assistant<|im_middle|>")[2]
    assert tool_calls(said) == calls
    assert text_before_calls(said) == "Wait."


def test_a_call_that_is_not_finished_is_none() -> None:
    begun = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"
    assert tool_calls(begun) == []
    assert text_before_calls(begun) == ""
    assert tool_calls("functions.f:0 {}") == []
    assert text_before_calls("functions.f:0 {}") == "functions.f:0 {}"
