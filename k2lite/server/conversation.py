"""A conversation in the one form that templates know, whichever API it came through.

Invariant: ids of calls are `functions.NAME:N`, N counted over the whole conversation: the models were trained on these.
A client may use any ids of its own; its history alone says which is which, so the server remembers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import invalid

_NAME = re.compile(r"[a-zA-Z0-9_.$-]{1,128}")
# Claude Code's first system block holds a hash that changes with every request and would defeat prefix reuse.
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")


@dataclass(frozen=True)
class Tool:
    """A declared function; `declaration` is OpenAI's form as the template gets it."""

    name: str
    parameters: Mapping[str, Any]
    declaration: Mapping[str, Any]

    @staticmethod
    def make(name: str, description: str | None, parameters: Mapping[str, Any] | None, where: str) -> Tool:
        if not _NAME.fullmatch(name):
            raise invalid(f"{where}: a tool's name is 1 to 128 of a-z A-Z 0-9 _ . $ -", where)
        function: dict[str, Any] = {"name": name}
        if description is not None:
            function["description"] = description
        given = {"type": "object", "properties": {}} if parameters is None else parameters
        function["parameters"] = given
        return Tool(name, given, {"type": "function", "function": function})


@dataclass
class Conversation:
    """What a client sent: messages in OpenAI's form, the tools, and which of them may or must be called.

    tool_choice: "auto", "none", "required", or the name of the one tool that must be called, behind an "="."""

    messages: list[dict[str, Any]]
    tools: list[Tool] = field(default_factory=list)
    tool_choice: str = "auto"
    parallel_calls: bool = True
    thinking: bool = True
    preserve_thinking: bool = False

    def check(self) -> None:
        """Raise ApiError for tools that contradict each other or the choice."""
        names = [tool.name for tool in self.tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise invalid(f"the tool {twice} is declared twice", "tools")
        if self.tool_choice.startswith("=") and self.tool_choice[1:] not in names:
            raise invalid(f"tool_choice names {self.tool_choice[1:]!r}, which is not declared", "tool_choice")
        if self.tool_choice == "required" and not names:
            raise invalid("tool_choice is required and there are no tools", "tool_choice")


def with_canonical_ids(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The messages with every id in canonical form, and how many calls they hold. A tool's message gets its tool's
    name, as in Moonshot's own examples. Raises ApiError for a result of a call that was not made."""
    renamed: dict[str, tuple[str, str]] = {}
    result, count = [], 0
    for place, message in enumerate(messages):
        message = dict(message)
        calls = message.get("tool_calls")
        if calls:
            canonical = []
            for call in calls:
                name = call["function"]["name"]
                new = f"functions.{name}:{count}"
                renamed[call["id"]] = (new, name)
                canonical.append({**call, "id": new})
                count += 1
            message["tool_calls"] = canonical
        if message["role"] == "tool":
            old = message.get("tool_call_id")
            if old not in renamed:
                where = f"messages[{place}].tool_call_id"
                raise invalid(f"{where} names a call that no message before it makes", where)
            message["tool_call_id"], name = renamed[old]
            message["name"] = message.get("name") or name
        result.append(message)
    return result, count


def without_billing_header(text: str) -> str:
    """A system text without Claude Code's changing header."""
    return _BILLING.sub("", text, count=1) if text.startswith("x-anthropic-billing-header:") else text
