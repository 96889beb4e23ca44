"""OpenAPI's description of what is served: GET /openapi.json.

Invariant: every route is here with each status it answers with; requests name the fields that are read, replies the
fields that are always there. Whatever else a client sends is ignored.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

Schema = dict[str, Any]
ANSWERED = {
    "400": "a field is wrong, or the request does not fit",
    "401": "the key is missing or wrong",
    "408": "the body did not end in time",
    "413": "the body is too large",
    "429": "the queue is full; Retry-After says when to come back",
    "500": "the engine failed at this request",
}
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
COUNT: Schema = {"type": "integer", "minimum": 1}
FLAG: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}
TEMPERATURE: Schema = {"type": "number", "minimum": 0, "maximum": 100}
TOP_P: Schema = {"type": "number", "minimum": 1e-9, "maximum": 1}
STOP: Schema = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": 64}]}
SEED: Schema = {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}


def described() -> Schema:
    """The whole description, JSON."""
    openai, anthropic = _named("OpenAIError"), _named("AnthropicError")
    post = {
        "/v1/chat/completions": (_named("ChatRequest"), _named("ChatCompletion"), True, openai),
        "/v1/completions": (_named("CompletionRequest"), _named("Completion"), True, openai),
        "/v1/responses": (_named("ResponsesRequest"), _named("Response"), True, openai),
        "/v1/messages": (_named("MessagesRequest"), _named("Message"), True, anthropic),
        "/v1/messages/count_tokens": (_named("CountRequest"), _object({"input_tokens": WHOLE}), False, anthropic),
    }
    paths: dict[str, Any] = {path: {"post": _post(*parts)} for path, parts in post.items()}
    model = _named("Model")
    paths["/v1/models"] = {"get": _get(_object({"data": {"type": "array", "items": model}}), openai)}
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    paths["/v1/models/{name}"] = {"get": {**_get(model, openai, "404"), "parameters": [name]}}
    paths["/metrics"] = {"get": _get(TEXT, openai, media="text/plain")}
    paths["/api/state"] = {"get": _get(_object({"model": TEXT, "counts": {"type": "array"}}), openai)}
    state = _object({"status": TEXT})
    paths["/health"] = {"get": {"security": [], "responses": {"200": _reply("the process answers", state)}}}
    not_ready = {"503": _reply("it is stopping", state)}
    paths["/ready"] = {
        "get": {"security": [], "responses": {"200": _reply("a request would be answered", state), **not_ready}}
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "k2lite serve", "version": version("k2lite")},
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": SECURITY},
    }


SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, *optional: str) -> Schema:
    """All of the properties are always there, but for the optional ones."""
    return {"type": "object", "properties": properties, "required": [key for key in properties if key not in optional]}


def _request(required: Schema, optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _reply(description: str, schema: Schema, media: str = "application/json") -> Schema:
    return {"description": description, "content": {media: {"schema": schema}}}


def _get(schema: Schema, error: Schema, *more: str, media: str = "application/json") -> Schema:
    replies = {"200": _reply("as asked", schema, media), "401": _reply(ANSWERED["401"], error)}
    return {"responses": replies | {status: _reply("there is no such thing here", error) for status in more}}


def _post(request: Schema, answer: Schema, streams: bool, error: Schema) -> Schema:
    good = _reply("the answer", answer)
    if streams:
        good["content"]["text/event-stream"] = {"schema": TEXT}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {"200": good} | {status: _reply(text, error) for status, text in ANSWERED.items()},
    }


def _schemas() -> dict[str, Schema]:
    function = _request({"name": {"type": "string", "pattern": "^[a-zA-Z0-9_.$-]{1,128}$"}}, {"description": TEXT})
    function["properties"]["parameters"] = ANY_OBJECT
    tool = _request({"type": {"enum": ["function"]}, "function": function}, {})
    claude_tool = _request({"name": function["properties"]["name"], "input_schema": ANY_OBJECT}, {"description": TEXT})
    said = _request({"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": TEXT}, {})
    turn = _request({"role": {"enum": ["user", "assistant"]}, "content": TEXT}, {})
    sampled: Schema = {"temperature": TEMPERATURE, "top_p": TOP_P, "stream": FLAG}
    openai: Schema = {**sampled, "seed": SEED, "stop": STOP, "max_tokens": COUNT, "n": {"type": "integer", "const": 1}}
    chat = {
        **openai,
        "max_completion_tokens": COUNT,
        "tools": _list(tool),
        "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required"]}, ANY_OBJECT]},
        "parallel_tool_calls": FLAG,
        "response_format": _request({"type": {"enum": ["text", "json_object", "json_schema"]}}, {}),
        "logprobs": FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    }
    claude = {"system": TEXT, "tools": _list(claude_tool), "tool_choice": ANY_OBJECT, "thinking": ANY_OBJECT}
    messages = {"messages": _list(turn, 1)}
    prompt: Schema = {"anyOf": [{**TEXT, "minLength": 1}, _list(WHOLE, 1)]}
    responses = {"instructions": TEXT, "max_output_tokens": COUNT, "tools": {"type": "array"}, **sampled}
    error = _object({"message": TEXT, "type": TEXT, "param": {}, "code": {}})
    return {
        "ChatRequest": _request({"messages": _list(said, 1)}, chat),
        "CompletionRequest": _request({"prompt": prompt}, openai),
        "ResponsesRequest": _request({"input": {"anyOf": [TEXT, _list(ANY_OBJECT, 1)]}}, responses),
        "MessagesRequest": _request({**messages, "max_tokens": COUNT}, {**claude, **sampled, "stop_sequences": STOP}),
        "CountRequest": _request(messages, claude),
        "ChatCompletion": _answer("choices", "chat.completion", usage=ANY_OBJECT, created=WHOLE),
        "Completion": _answer("choices", "text_completion", usage=ANY_OBJECT, created=WHOLE),
        "Response": _answer("output", "response", status=TEXT),
        "Message": _object(
            {"id": TEXT, "type": {"const": "message"}, "content": _list(ANY_OBJECT), "stop_reason": TEXT, "usage": {}}
        ),
        "Model": _object({"id": TEXT}),
        "OpenAIError": _object({"error": error}),
        "AnthropicError": _object({"type": {"const": "error"}, "error": _object({"type": TEXT, "message": TEXT})}),
    }


def _list(items: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": at_least}


def _answer(parts: str, kind: str, **more: Schema) -> Schema:
    return _object({"id": TEXT, "object": {"const": kind}, "model": TEXT, parts: _list(ANY_OBJECT), **more})
