"""OpenAI's Responses as far as Codex needs it: items in, items and their events out. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from k2lite.text.answer_reader import CallBegin, Event, Reasoning, Text

from .answering import Finish, Piece, Usage
from .conversation import Conversation, Tool
from .errors import ApiError, invalid
from .fields import Fields
from .json_text import to_json
from .openai_chat import read_tool_choice
from .service import Answer, Limits, Service, Wanted


def read_request(fields: Fields, limits: Limits) -> tuple[Conversation, Wanted]:
    """The conversation and how to answer it. Raises ApiError."""
    if fields.get("previous_response_id") is not None:
        raise invalid("previous_response_id is not supported: nothing is stored", "previous_response_id")
    messages = _messages(fields)
    instructions = fields.string("instructions")
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    if not messages:
        raise invalid("input is missing or empty", "input")
    if len(messages) > limits.max_messages:
        raise invalid(f"input has more than {limits.max_messages} items", "input")
    conversation = Conversation(
        messages,
        _tools(fields, limits),
        read_tool_choice(fields),
        parallel_calls=fields.boolean("parallel_tool_calls", True),
        thinking=(fields.object("reasoning") or Fields({}, "")).get("effort") != "none",
    )
    return conversation, Wanted(
        max_tokens=fields.integer("max_output_tokens", at_least=1),
        sampling={
            "temperature": fields.number("temperature", at_least=0, at_most=100),
            "top_p": fields.number("top_p", at_least=1e-9, at_most=1),
        },
        schema=_format(fields),
    )


def _messages(fields: Fields) -> list[dict[str, Any]]:
    if isinstance(fields.get("input"), str):
        return [{"role": "user", "content": fields.get("input")}]
    messages: list[dict[str, Any]] = []
    for item in fields.objects("input"):
        kind = item.string("type", "message")
        if kind == "message":
            role = item.choice("role", ("user", "assistant", "system", "developer"), "")
            said = {"role": "system" if role == "developer" else role, "content": _text(item, "content")}
            if role == "assistant" and _open_turn(messages) and not messages[-1]["content"]:
                messages[-1]["content"] = said["content"]
            else:
                messages.append(said)
        elif kind == "reasoning":
            thought = _text(item, "content") or _text(item, "summary")
            messages.append({"role": "assistant", "content": "", "reasoning_content": thought})
        elif kind == "function_call":
            if not _open_turn(messages):
                messages.append({"role": "assistant", "content": ""})
            function = {
                "name": item.required_string("name"),
                "arguments": item.required_string("arguments") or "{}",
            }
            call = {"id": item.required_string("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            call_id = item.required_string("call_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": _text(item, "output")})
        else:
            raise invalid(f"{item.path('type')} is {kind}, which this server does not take", item.path("type"))
    return messages


def _open_turn(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and messages[-1]["role"] == "assistant"


def _text(item: Fields, name: str) -> str:
    value = item.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    kinds = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")
    texts = []
    for part in item.objects(name):
        if part.string("type", "text") not in kinds:
            raise invalid(f"{part.path('type')} is {part.get('type')}; this server takes text only", part.path("type"))
        texts.append(part.required_string("refusal" if part.get("type") == "refusal" else "text"))
    return "".join(texts)


def _tools(fields: Fields, limits: Limits) -> list[Tool]:
    """Functions; tools that run at OpenAI (web search and the like) are passed over, as nothing could call them."""
    tools = []
    for entry in fields.objects("tools"):
        if entry.string("type", "function") == "function":
            parameters = entry.object("parameters")
            given = None if parameters is None else parameters.values
            name = entry.required_string("name")
            tools.append(Tool.make(name, entry.string("description"), given, entry.path("name")))
    if len(tools) > limits.max_tools:
        raise invalid(f"tools has more than {limits.max_tools} entries", "tools")
    return tools


def _format(fields: Fields) -> dict[str, Any] | None:
    text = fields.object("text")
    form = text.object("format") if text else None
    if form is None:
        return None
    kind = form.choice("type", ("text", "json_object", "json_schema"), "text")
    if kind == "json_schema":
        schema = form.object("schema")
        if schema is None:
            raise invalid(f"{form.path('schema')} is missing", form.path("schema"))
        return dict(schema.values)
    return {"type": "object"} if kind == "json_object" else None


class ResponseWriter:
    """The shapes of one answer. The whole answer is the last event of the stream."""

    def __init__(self, service: Service) -> None:
        self.id = f"resp_{secrets.token_hex(12)}"
        self._service = service
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._number = 0

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        finish = Finish("stop")
        async for news in answer:
            if isinstance(news, Finish):
                finish = news
            elif isinstance(news, Piece):
                for event in news.events:
                    for _ in self._event(event):
                        pass
        for _ in self._close():
            pass
        return self._finished(finish, answer.usage)

    async def stream(self, answer: Answer) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        for kind in ("response.created", "response.in_progress"):
            yield self._sse(kind, response=self._response("in_progress"))
        finish = Finish("stop")
        try:
            async for news in answer:
                if isinstance(news, Finish):
                    finish = news
                elif isinstance(news, Piece):
                    for event in news.events:
                        for text in self._event(event):
                            yield text
        except ApiError as error:
            failed = {"code": "server_error", "message": str(error)}
            yield self._sse("response.failed", response={**self._response("failed"), "error": failed})
            return
        for text in self._close():
            yield text
        response = self._finished(finish, answer.usage)
        yield self._sse(f"response.{response['status']}", response=response)

    def _finished(self, finish: Finish, counted: Usage) -> dict[str, Any]:
        cut = finish.reason == "length"
        response = self._response("incomplete" if cut else "completed")
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["usage"] = {
            "input_tokens": counted.prompt_tokens,
            "input_tokens_details": {"cached_tokens": counted.cached_tokens},
            "output_tokens": counted.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
            "total_tokens": counted.prompt_tokens + counted.completion_tokens,
        }
        return response

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._service.name,
            "output": list(self._items),
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "usage": None,
        }

    def _event(self, event: Event) -> Iterator[str]:
        kind = {Text: "message", Reasoning: "reasoning", CallBegin: "function_call"}.get(type(event))
        last = self._items[-1]["type"] if self._items else None
        if kind is not None and (kind == "function_call" or kind != last):
            yield from self._close()
            yield from self._open(event)
        if isinstance(event, CallBegin):
            return
        item, at = self._items[-1], len(self._items) - 1
        common: dict[str, Any] = {"item_id": item["id"], "output_index": at, "delta": event.text}
        if item["type"] == "function_call":
            item["arguments"] += event.text
            yield self._sse("response.function_call_arguments.delta", **common)
            return
        item["content"][0]["text"] += event.text
        if item["type"] == "message":
            yield self._sse("response.output_text.delta", content_index=0, logprobs=[], **common)
        else:
            yield self._sse("response.reasoning_text.delta", content_index=0, **common)

    def _open(self, event: Event) -> Iterator[str]:
        item: dict[str, Any]
        token = secrets.token_hex(12)
        if isinstance(event, CallBegin):
            item = {"id": f"fc_{token}", "type": "function_call", "status": "in_progress", "call_id": event.id}
            item |= {"name": event.name, "arguments": ""}
        elif isinstance(event, Text):
            item = {
                "id": f"msg_{token}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
        else:
            item = {"id": f"rs_{token}", "type": "reasoning", "summary": [], "content": []}
        self._items.append(item)
        at = len(self._items) - 1
        yield self._sse("response.output_item.added", output_index=at, item=item)
        if isinstance(event, Text):
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._sse(
                "response.content_part.added", item_id=item["id"], output_index=at, content_index=0, part=part
            )
            item["content"].append(part)
        elif isinstance(event, Reasoning):
            item["content"].append({"type": "reasoning_text", "text": ""})

    def _close(self) -> Iterator[str]:
        """End the item that is open."""
        if not self._items:
            return
        item, at = self._items[-1], len(self._items) - 1
        where = {"item_id": item["id"], "output_index": at}
        if item["type"] == "function_call":
            yield self._sse(
                "response.function_call_arguments.done", **where, name=item["name"], arguments=item["arguments"]
            )
        elif item["type"] == "message":
            part = item["content"][0]
            done = {"content_index": 0, "text": part["text"], "logprobs": []}
            yield self._sse("response.output_text.done", **where, **done)
            yield self._sse("response.content_part.done", **where, content_index=0, part=part)
        else:
            yield self._sse("response.reasoning_text.done", **where, content_index=0, text=item["content"][0]["text"])
        if "status" in item:
            item["status"] = "completed"
        yield self._sse("response.output_item.done", output_index=at, item=item)

    def _sse(self, kind: str, **values: Any) -> str:
        event = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return f"event: {kind}\ndata: {to_json(event)}\n\n"
