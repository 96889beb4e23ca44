"""OpenAI's chat completions: what a request means, and what its answer looks like, whole and streamed."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from k2lite.text.answer_reader import CallArguments, CallBegin, Event, Reasoning, Text

from .answering import Finish, Piece, TokenRecord, Usage
from .conversation import Conversation, Tool
from .errors import ApiError, invalid
from .fields import Fields
from .json_text import to_json
from .openai_messages import read_messages
from .service import Answer, Limits, Service, Wanted


def read_request(fields: Fields, limits: Limits) -> tuple[Conversation, Wanted]:
    """The conversation and how to answer it. Raises ApiError."""
    messages = fields.objects("messages")
    if not messages:
        raise invalid("messages is missing or empty", "messages")
    if len(messages) > limits.max_messages:
        raise invalid(f"messages has more than {limits.max_messages} entries", "messages")
    template = fields.object("chat_template_kwargs") or Fields({}, "chat_template_kwargs")
    conversation = Conversation(
        read_messages(messages),
        read_tools(fields, limits),
        read_tool_choice(fields),
        parallel_calls=fields.boolean("parallel_tool_calls", True),
        thinking=_thinks(fields, template),
        preserve_thinking=template.boolean("preserve_thinking", _keeps_thoughts(fields)),
    )
    return conversation, read_wanted(fields)


def read_wanted(fields: Fields) -> Wanted:
    """Sampling, length and form."""
    if (fields.integer("n", at_least=1) or 1) != 1:
        raise invalid("n is more than 1; one answer is made a request", "n")
    for name in ("presence_penalty", "frequency_penalty"):
        if fields.number(name, at_least=-2, at_most=2):
            raise invalid(f"{name} is not supported; leave it out or 0", name)
    bias = fields.object("logit_bias")
    if bias is not None and bias.values:
        raise invalid("logit_bias is not supported", "logit_bias")
    limit = fields.integer("max_completion_tokens", at_least=1)
    seed = fields.integer("seed", at_least=-(1 << 63))
    top = fields.integer("top_logprobs", at_least=0, at_most=20)
    return Wanted(
        max_tokens=limit if limit is not None else fields.integer("max_tokens", at_least=1),
        sampling={
            "temperature": fields.number("temperature", at_least=0, at_most=100),
            "top_p": fields.number("top_p", at_least=1e-9, at_most=1),
            "top_k": max(0, fields.integer("top_k", at_least=-1) or 0) or None,
            "min_p": fields.number("min_p", at_least=0, at_most=1),
            "seed": None if seed is None else seed % (1 << 64),
        },
        stop=_stops(fields),
        top_logprobs=(top or 0) if fields.get("logprobs") is True else None,
        schema=read_response_format(fields),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.strings("stop")
    if len(stops) > 64:
        raise invalid("stop has more than 64 entries", "stop")
    return tuple(text for text in stops if text)


def read_response_format(fields: Fields) -> dict[str, Any] | None:
    """The schema that the whole answer must satisfy, None where any text will do."""
    form = fields.object("response_format")
    if form is None:
        return None
    kind = form.choice("type", ("text", "json_object", "json_schema"), "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = form.object("json_schema")
    schema = described.get("schema") if described else None
    if not isinstance(schema, dict):
        raise invalid("response_format.json_schema.schema must be an object", "response_format")
    return schema


def read_tools(fields: Fields, limits: Limits) -> list[Tool]:
    """Declared functions; a tool of a client's own kind (Kimi's builtin_function) is passed over."""
    tools = []
    for entry in fields.objects("tools"):
        if entry.string("type", "function") not in ("function", "builtin_function"):
            raise invalid(f"{entry.path('type')} must be function", entry.path("type"))
        function = entry.object("function")
        if function is None:
            raise invalid(f"{entry.path('function')} is missing", entry.path("function"))
        parameters = function.object("parameters")
        tools.append(
            Tool.make(
                function.required_string("name"),
                function.string("description"),
                None if parameters is None else parameters.values,
                function.path("name"),
            )
        )
    if len(tools) > limits.max_tools:
        raise invalid(f"tools has more than {limits.max_tools} entries", "tools")
    return tools


def read_tool_choice(fields: Fields) -> str:
    choice = fields.get("tool_choice")
    if choice is None:
        return "auto"
    if isinstance(choice, dict):
        function = Fields(choice, "tool_choice").object("function")
        return "=" + (function.required_string("name") if function else Fields(choice, "").required_string("name"))
    if choice not in ("auto", "none", "required"):
        raise invalid("tool_choice must be auto, none, required or a function", "tool_choice")
    return str(choice)


def _thinks(fields: Fields, template: Fields) -> bool:
    """Whether the model may think: Moonshot's switch, or the open servers'."""
    switch = fields.get("thinking")
    if isinstance(switch, dict):
        return switch.get("type") != "disabled"
    return template.boolean("thinking", template.boolean("enable_thinking", True))


def _keeps_thoughts(fields: Fields) -> bool:
    switch = fields.get("thinking")
    return isinstance(switch, dict) and switch.get("keep") == "all"


class ChatWriter:
    """The shapes of one answer."""

    def __init__(self, service: Service) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._service = service
        head = to_json(self._head("chat.completion.chunk"))
        # what all chunks of an answer begin with
        self._begin = f'data: {head[:-1]}, "choices": [{{"index": 0, "delta": '

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer as one object."""
        texts: dict[str, str] = {"content": "", "reasoning_content": ""}
        calls: list[dict[str, Any]] = []
        records: list[TokenRecord] = []
        reason = "stop"
        async for news in answer:
            if isinstance(news, Finish):
                reason = news.reason
            elif isinstance(news, Piece):
                records += news.records
                for event in news.events:
                    collect(event, texts, calls)
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"] or (None if calls else "")}
        if texts["reasoning_content"]:
            message["reasoning_content"] = texts["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": self._logprobs(answer, records)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer.usage)}

    async def stream(self, answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for news in answer:
                if isinstance(news, Finish):
                    yield self._chunk({}, finish_reason=news.reason)
                elif isinstance(news, Piece):
                    logprobs = self._logprobs(answer, news.records)
                    for delta in _deltas(news.events) if news.events else [{"content": ""}]:
                        yield self._chunk(delta, logprobs=logprobs)
                        logprobs = None
            if include_usage:
                yield sse({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer.usage)})
        except ApiError as error:
            yield sse(error_body(error))
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._service.name}

    def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None, logprobs: Any = None) -> str:
        end = f'"finish_reason": {to_json(finish_reason)}, "logprobs": {to_json(logprobs)}}}]}}'
        return f"{self._begin}{to_json(delta)}, {end}\n\n"

    def _logprobs(self, answer: Answer, records: Any) -> dict[str, Any] | None:
        if answer.job.request.top_logprobs is None or not (records or not answer.done):
            return None
        return {"content": [self._record(record) for record in records], "refusal": None}

    def _record(self, record: TokenRecord) -> dict[str, Any]:
        top = [self._token(number, logprob) for number, logprob in record.top]
        return {**self._token(record.id, record.logprob), "top_logprobs": top}

    def _token(self, number: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._service.engine.tokenizer
        raw = (
            b"" if number in self._service.control.all or number >= tokenizer.n_vocab else tokenizer.token_bytes(number)
        )
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def collect(event: Event, texts: dict[str, str], calls: list[dict[str, Any]]) -> None:
    """Add an event to a message in the making."""
    if isinstance(event, Text):
        texts["content"] += event.text
    elif isinstance(event, Reasoning):
        texts["reasoning_content"] += event.text
    elif isinstance(event, CallBegin):
        calls.append({"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}})
    else:
        calls[event.index]["function"]["arguments"] += event.text


def _deltas(events: Any) -> Iterator[dict[str, Any]]:
    """One delta an event: clients read one kind of thing from a chunk."""
    for event in events:
        if isinstance(event, Text):
            yield {"content": event.text}
        elif isinstance(event, Reasoning):
            yield {"reasoning_content": event.text}
        elif isinstance(event, CallBegin):
            function = {"name": event.name, "arguments": ""}
            yield {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        elif isinstance(event, CallArguments):
            yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def usage(counted: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": counted.prompt_tokens,
        "completion_tokens": counted.completion_tokens,
        "total_tokens": counted.prompt_tokens + counted.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counted.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
    }


KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}


def error_body(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def sse(value: dict[str, Any]) -> str:
    return f"data: {to_json(value)}\n\n"
