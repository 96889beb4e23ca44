"""A conversation with one tool, as a program holds it: ask, read the call, run the tool, give back its result.

`python tools/demo_tool_call.py [MODEL]`; without MODEL the demo checkpoint answers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import k2lite
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.text.tool_calls import text_before_calls, tool_calls

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "send_letter",
            "description": "Send a letter.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "count": {"type": "integer"}},
                "required": ["city", "count"],
            },
        },
    }
]
QUESTION = "Please send a letter with city Torino and count 3."


def send_letter(city: str, count: int) -> dict[str, Any]:  # noqa: ARG001
    """A stamp costs 17, wherever the letter goes."""
    return {"total": 17 * count}


def main() -> int:
    engine = k2lite.load(sys.argv[1] if len(sys.argv) > 1 else DEMO_FOLDER)
    messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
    print(f"user:      {QUESTION}")
    answer = said(engine, messages)
    calls = tool_calls(answer)
    for call in calls:
        print(f"assistant: calls {call.name} with {call.arguments}")
    if not calls:
        print(f"assistant: {answer}")
        return 1
    called = [call.as_message_part() for call in calls]
    messages.append({"role": "assistant", "content": text_before_calls(answer), "tool_calls": called})
    for call in calls:
        result = json.dumps(send_letter(**json.loads(call.arguments)))
        print(f"tool:      {call.id} returns {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})
    print(f"assistant: {said(engine, messages)}")
    return 0


def said(engine: k2lite.Engine, messages: list[dict[str, Any]]) -> str:
    """The likeliest answer, control tokens of tool calls included."""
    prompt = engine.tokenizer.render(messages, TOOLS)
    tokens = [int(token) for token in engine.generate(prompt.ids, max_tokens=100, temperature=0)]
    stops = engine.stop_ids
    return engine.tokenizer.decode([token for token in tokens if token not in stops])


if __name__ == "__main__":
    sys.exit(main())
