"""Anthropic's messages API: what a request means, and what its answer looks like, whole and streamed.

Blocks become the templates' messages: thinking is reasoning_content, each tool_result a tool message of its own before
the text of its turn. Ids that are handed out fit Anthropic's pattern; history alone maps them back (conversation.py).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from k2lite.text.answer_reader import CallBegin, Event, Reasoning, Text

from .answering import Finish, FinishReason, Piece, Usage
from .conversation import Conversation, Tool, without_billing_header
from .errors import ApiError, invalid
from .fields import Fields
from .json_text import to_json
from .service import Answer, Limits, Service, Wanted

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    return {"type": "error", "error": {"type": KINDS.get(error.status, "api_error"), "message": str(error)}}


def read_request(fields: Fields, limits: Limits) -> tuple[Conversation, Wanted]:
    """The conversation and how to answer it. Raises ApiError."""
    conversation = read_conversation(fields, limits)
    max_tokens = fields.integer("max_tokens", at_least=1)
    if max_tokens is None:
        raise invalid("max_tokens is missing", "max_tokens")
    return conversation, Wanted(
        max_tokens=max_tokens,
        sampling={
            "temperature": fields.number("temperature", at_least=0, at_most=100),
            "top_p": fields.number("top_p", at_least=1e-9, at_most=1),
            "top_k": fields.integer("top_k", at_least=0),
        },
        stop=tuple(text for text in fields.strings("stop_sequences") if text),
        schema=_format(fields),
    )


def read_conversation(fields: Fields, limits: Limits) -> Conversation:
    """Messages, tools and choice; what count_tokens takes too."""
    entries = fields.objects("messages")
    if not entries:
        raise invalid("messages is missing or empty", "messages")
    if len(entries) > limits.max_messages:
        raise invalid(f"messages has more than {limits.max_messages} entries", "messages")
    system = _system(fields)
    messages = [{"role": "system", "content": system}] if system else []
    for entry in entries:
        messages += _turn(entry)
    choice = fields.object("tool_choice")
    thinking = fields.object("thinking")
    return Conversation(
        messages,
        _tools(fields, limits),
        _choice(choice),
        parallel_calls=not (choice is not None and choice.boolean("disable_parallel_tool_use")),
        thinking=thinking is not None and thinking.get("type") != "disabled",
    )


def _format(fields: Fields) -> dict[str, Any] | None:
    output = fields.object("output_config")
    form = (output.object("format") if output else None) or fields.object("output_format")
    if form is None or form.get("type") != "json_schema":
        return None
    schema = form.object("schema")
    if schema is None:
        raise invalid(f"{form.path('schema')} is missing", form.path("schema"))
    return dict(schema.values)


def _system(fields: Fields) -> str:
    value = fields.get("system")
    if value is None or isinstance(value, str):
        return without_billing_header(value or "")
    texts = [without_billing_header(block.required_string("text")) for block in fields.objects("system")]
    return "\n\n".join(text for text in texts if text)


def _turn(entry: Fields) -> list[dict[str, Any]]:
    """The messages that one message's blocks become."""
    role = entry.choice("role", ("user", "assistant", "system"), "")
    content = entry.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": without_billing_header(content) if role == "system" else content}]
    blocks = entry.objects("content")
    if role == "assistant":
        return [_assistant(blocks)]
    results = [_result(block) for block in blocks if block.get("type") == "tool_result"]
    texts = [_text(block) for block in blocks if block.get("type") != "tool_result"]
    said = [{"role": role, "content": "\n".join(texts)}] if texts or not results else []
    return [*results, *said]


def _text(block: Fields) -> str:
    kind = block.string("type", "text")
    if kind != "text":
        raise invalid(f"{block.path('type')} is {kind}; this server takes text only", block.path("type"))
    return block.required_string("text")


def _result(block: Fields) -> dict[str, Any]:
    content = block.get("content")
    if content is not None and not isinstance(content, str):
        content = "\n".join(_text(part) for part in block.objects("content") if part.get("type") != "tool_reference")
    text = content or ""
    if block.boolean("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.required_string("tool_use_id"), "content": text}


def _assistant(blocks: list[Fields]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.string("type", "text")
        if kind == "thinking":
            thoughts.append(block.string("thinking", "") or "")
        elif kind == "tool_use":
            given = block.object("input")
            arguments = to_json(dict(given.values) if given else {})
            function = {"name": block.required_string("name"), "arguments": arguments}
            calls.append({"id": block.required_string("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            texts.append(_text(block))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _tools(fields: Fields, limits: Limits) -> list[Tool]:
    tools = []
    for entry in fields.objects("tools"):
        schema = entry.object("input_schema")
        if schema is None:
            if entry.string("type", "custom") != "custom":
                continue  # a tool that runs at Anthropic: there is nothing to call here
            raise invalid(f"{entry.path('input_schema')} is missing", entry.path("input_schema"))
        name = entry.required_string("name")
        tools.append(Tool.make(name, entry.string("description"), schema.values, entry.path("name")))
    if len(tools) > limits.max_tools:
        raise invalid(f"tools has more than {limits.max_tools} entries", "tools")
    return tools


def _choice(choice: Fields | None) -> str:
    if choice is None:
        return "auto"
    kind = choice.choice("type", ("auto", "any", "tool", "none"), "auto")
    if kind == "tool":
        return "=" + choice.required_string("name")
    return {"any": "required"}.get(kind, kind)


class MessageWriter:
    """The shapes of one answer."""

    def __init__(self, service: Service) -> None:
        self.id = f"msg_{secrets.token_hex(12)}"
        self._service = service

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        blocks: list[dict[str, Any]] = []
        finish = Finish("stop")
        async for news in answer:
            if isinstance(news, Finish):
                finish = news
            elif isinstance(news, Piece):
                for event in news.events:
                    _collect(event, blocks)
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = _object(block["input"])
        return {
            **self._message(blocks, answer.usage),
            "stop_reason": _stop_reason(finish),
            "stop_sequence": finish.stop_sequence,
        }

    async def stream(self, answer: Answer) -> AsyncIterator[str]:
        """The answer as server-sent events, one block open at a time."""
        yield sse("message_start", message=self._message([], answer.usage))
        blocks: list[dict[str, Any]] = []
        finish = Finish("stop")
        try:
            async for news in answer:
                if isinstance(news, Finish):
                    finish = news
                elif isinstance(news, Piece):
                    for event in news.events:
                        for text in _streamed(event, blocks):
                            yield text
        except ApiError as error:
            yield f"event: error\ndata: {to_json(error_body(error))}\n\n"
            return
        for text in _closed(blocks):
            yield text
        delta = {"stop_reason": _stop_reason(finish), "stop_sequence": finish.stop_sequence}
        yield sse("message_delta", delta=delta, usage=usage(answer.usage))
        yield sse("message_stop")

    def _message(self, content: list[dict[str, Any]], counted: Usage) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._service.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(counted),
        }


def _new_block(event: Event) -> dict[str, Any]:
    if isinstance(event, Text):
        return {"type": "text", "text": ""}
    if isinstance(event, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    assert isinstance(event, CallBegin)
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": event.name, "input": {}}


_KEYS = {"text": ("text", "text_delta", "text"), "thinking": ("thinking", "thinking_delta", "thinking")}


def _begins_block(event: Event, blocks: list[dict[str, Any]]) -> bool:
    kind = {Text: "text", Reasoning: "thinking", CallBegin: "tool_use"}.get(type(event))
    return kind is not None and (kind == "tool_use" or not blocks or blocks[-1]["type"] != kind)


def _collect(event: Event, blocks: list[dict[str, Any]]) -> None:
    if _begins_block(event, blocks):
        blocks.append(_new_block(event))
    block = blocks[-1]
    if isinstance(event, CallBegin):
        block["input"] = ""
    elif block["type"] == "tool_use":
        block["input"] += event.text
    else:
        block[_KEYS[block["type"]][0]] += event.text


def _streamed(event: Event, blocks: list[dict[str, Any]]) -> Iterator[str]:
    if _begins_block(event, blocks):
        yield from _closed(blocks)
        blocks.append(_new_block(event))
        yield sse("content_block_start", index=len(blocks) - 1, content_block=blocks[-1])
    if isinstance(event, CallBegin):
        return
    if blocks[-1]["type"] == "tool_use":
        delta = {"type": "input_json_delta", "partial_json": event.text}
    else:
        _, kind, key = _KEYS[blocks[-1]["type"]]
        delta = {"type": kind, key: event.text}
    yield sse("content_block_delta", index=len(blocks) - 1, delta=delta)


def _closed(blocks: list[dict[str, Any]]) -> Iterator[str]:
    if not blocks:
        return
    index = len(blocks) - 1
    if blocks[-1]["type"] == "thinking":
        yield sse("content_block_delta", index=index, delta={"type": "signature_delta", "signature": "k2lite"})
    yield sse("content_block_stop", index=index)


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:  # cut by max_tokens: without a constraint there is no promise
        return {}
    return value if isinstance(value, dict) else {"value": value}


def _stop_reason(finish: Finish) -> str:
    if finish.stop_sequence is not None:
        return "stop_sequence"
    reasons: dict[FinishReason, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return reasons[finish.reason]


def usage(counted: Usage) -> dict[str, Any]:
    return {
        "input_tokens": counted.prompt_tokens - counted.cached_tokens,
        "output_tokens": counted.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counted.cached_tokens,
    }


def sse(kind: str, **values: Any) -> str:
    return f"event: {kind}\ndata: {to_json({'type': kind, **values})}\n\n"
