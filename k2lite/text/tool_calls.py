"""Tool calls as Kimi-K2 writes them, read out of an answer's text.

A call is `functions.NAME:NUMBER` and its arguments between control tokens; the id is what the tool's result must name.
For programs that hold a whole answer, such as tools/demo_tool_call.py, and for judging answers: strict, where
answer_reader.py, through which the server streams, takes every deviation on file. Does not judge arguments: they are
the model's text, JSON or not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SECTION_BEGIN = "<|tool_calls_section_begin|>"
_CALL = re.compile(
    r"<\|tool_call_begin\|>\s*(functions\.([\w.-]+):\d+)\s*<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>",
    re.DOTALL,
)


class ToolCall(NamedTuple):
    """One call: its id ("functions.get_weather:0"), the tool's name, the arguments as the model wrote them."""

    id: str
    name: str
    arguments: str

    def as_message_part(self) -> dict[str, object]:
        """The call in OpenAI's form, for the assistant's message in the conversation that goes on."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def tool_calls(text: str) -> list[ToolCall]:
    """The complete calls in an answer, in order."""
    return [ToolCall(*match) for match in _CALL.findall(text)]


def text_before_calls(text: str) -> str:
    """What the answer says before it calls tools."""
    return text.partition(SECTION_BEGIN)[0]
