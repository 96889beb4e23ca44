"""OpenAI's messages, checked, in the form that templates take."""

from __future__ import annotations

from typing import Any

from .errors import invalid
from .fields import Fields

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(entries: list[Fields]) -> list[dict[str, Any]]:
    """Each message with role, content and what else its role may have. Raises ApiError."""
    return [_read(entry) for entry in entries]


def _read(entry: Fields) -> dict[str, Any]:
    role = entry.choice("role", ROLES, "")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _content(entry)}
    if (name := entry.string("name")) is not None:
        message["name"] = name
    if role == "assistant":
        reasoning = entry.string("reasoning_content")
        reasoning = entry.string("reasoning") if reasoning is None else reasoning
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        calls = [_call(call) for call in entry.objects("tool_calls")]
        if calls:
            message["tool_calls"] = calls
    if role == "tool":
        message["tool_call_id"] = entry.required_string("tool_call_id")
    return message


def _content(entry: Fields) -> str:
    """Text, or the text of parts."""
    value = entry.get("content")
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in entry.objects("content"):
        kind = part.string("type", "text")
        if kind == "refusal":
            texts.append(part.required_string("refusal"))
        elif kind in ("text", "input_text", "output_text"):
            texts.append(part.required_string("text"))
        else:
            raise invalid(f"{part.path('type')} is {kind}; this server takes text only", part.path("type"))
    return "".join(texts)


def _call(call: Fields) -> dict[str, Any]:
    function = call.object("function")
    if function is None:
        raise invalid(f"{call.path('function')} is missing", call.path("function"))
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict):
        raise invalid(f"{function.path('arguments')} must be a string of JSON", function.path("arguments"))
    return {
        "id": call.required_string("id"),
        "type": "function",
        "function": {"name": function.required_string("name"), "arguments": arguments or "{}"},
    }
