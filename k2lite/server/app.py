"""Routes, keys, body limits and disconnects: the outside of the server.

Built on Starlette (routing, streaming) and run by uvicorn: both small, long kept, and without ideas of their own on
validation, which must answer in each API's own shape here.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from . import anthropic_messages, openai_chat, openai_completions, openai_responses
from .answering import AnswerRequest
from .errors import ApiError, broken, frames_of, invalid
from .fields import Fields, parse_object
from .metrics import Metrics
from .openapi import described
from .service import Answer, Service

ErrorBody = Callable[[ApiError], dict[str, Any]]
Handler = Callable[[Request], Awaitable[Response]]
NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
log = logging.getLogger("k2lite.server")


class Server:
    """The routes of one service; `key` is what clients must show, None if nothing."""

    def __init__(self, service: Service, *, key: str | None = None) -> None:
        self.service = service
        self._key = key
        self._metrics = Metrics(service)

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and ends the scheduler."""
        openai, anthropic = openai_chat.error_body, anthropic_messages.error_body
        routes = [
            self._route("/v1/chat/completions", self.chat, openai),
            self._route("/v1/completions", self.completions, openai),
            self._route("/v1/models", self.models, openai, methods=["GET"]),
            self._route("/v1/models/{name:path}", self.model, openai, methods=["GET"]),
            self._route("/v1/responses", self.responses, openai),
            self._route("/v1/messages", self.messages, anthropic),
            self._route("/v1/messages/count_tokens", self.count_tokens, anthropic),
            self._route("/metrics", self.prometheus, openai, methods=["GET"]),
            self._route("/api/state", self.state, openai, methods=["GET"]),
            Route("/openapi.json", self.description),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/", self.page),
        ]
        failed: Any = {HTTPException: _no_such_page}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=failed)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.service.scheduler.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.service.scheduler.close)

    async def chat(self, request: Request) -> Response:
        fields = await self._body(request)
        conversation, wanted = await run_in_threadpool(openai_chat.read_request, fields, self.service.limits)
        prepared = await run_in_threadpool(self.service.prepare, conversation, wanted)
        writer = openai_chat.ChatWriter(self.service)
        if not fields.boolean("stream"):
            return JSONResponse(await self._whole(request, prepared, writer.whole))
        include_usage = _include_usage(fields)
        return await self._stream(request, prepared, lambda answer: writer.stream(answer, include_usage=include_usage))

    async def completions(self, request: Request) -> Response:
        fields = await self._body(request)
        if fields.get("suffix"):
            raise invalid("suffix is not supported: Kimi-K2 was not trained to fill in", "suffix")
        for name in ("logprobs", "response_format", "echo", "best_of"):
            if fields.get(name) not in (None, False) and not (name == "best_of" and fields.get(name) == 1):
                raise invalid(f"{name} is not supported in completions; chat completions take most of it", name)
        wanted = openai_chat.read_wanted(fields)
        limit = wanted.max_tokens or openai_completions.DEFAULT_MAX_TOKENS
        ids = await run_in_threadpool(openai_completions.read_prompt, fields, self.service)
        prepared = self.service.prepare_text(ids, replace(wanted, max_tokens=limit, top_logprobs=None))
        writer = openai_completions.CompletionWriter(self.service)
        if not fields.boolean("stream"):
            return JSONResponse(await self._whole(request, prepared, writer.whole))
        include_usage = _include_usage(fields)
        return await self._stream(request, prepared, lambda answer: writer.stream(answer, include_usage=include_usage))

    async def messages(self, request: Request) -> Response:
        fields = await self._body(request)
        conversation, wanted = await run_in_threadpool(anthropic_messages.read_request, fields, self.service.limits)
        prepared = await run_in_threadpool(self.service.prepare, conversation, wanted)
        writer = anthropic_messages.MessageWriter(self.service)
        if not fields.boolean("stream"):
            return JSONResponse(await self._whole(request, prepared, writer.whole))
        return await self._stream(request, prepared, writer.stream)

    async def responses(self, request: Request) -> Response:
        fields = await self._body(request)
        conversation, wanted = await run_in_threadpool(openai_responses.read_request, fields, self.service.limits)
        prepared = await run_in_threadpool(self.service.prepare, conversation, wanted)
        writer = openai_responses.ResponseWriter(self.service)
        if not fields.boolean("stream"):
            return JSONResponse(await self._whole(request, prepared, writer.whole))
        return await self._stream(request, prepared, writer.stream)

    async def count_tokens(self, request: Request) -> Response:
        fields = await self._body(request)
        conversation = await run_in_threadpool(anthropic_messages.read_conversation, fields, self.service.limits)
        ids, _ = await run_in_threadpool(self.service.prompt_ids, conversation)
        return JSONResponse({"input_tokens": len(ids)})

    async def models(self, request: Request) -> Response:
        if "anthropic-version" in request.headers:
            model = self._anthropic_model()
            name = self.service.name
            return JSONResponse({"data": [model], "has_more": False, "first_id": name, "last_id": name})
        return JSONResponse({"object": "list", "data": [self._openai_model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.service.name:
            raise ApiError(404, f"there is one model here: {self.service.name}", code="model_not_found")
        anthropic = "anthropic-version" in request.headers
        return JSONResponse(self._anthropic_model() if anthropic else self._openai_model())

    def _openai_model(self) -> dict[str, Any]:
        return {
            "id": self.service.name,
            "object": "model",
            "created": self.service.started_s,
            "owned_by": "k2lite",
            "max_model_len": self.service.engine.placement.context_tokens,
        }

    def _anthropic_model(self) -> dict[str, Any]:
        created = datetime.fromtimestamp(self.service.started_s, UTC).isoformat()
        return {"type": "model", "id": self.service.name, "display_name": self.service.name, "created_at": created}

    async def prometheus(self, _: Request) -> Response:
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def state(self, _: Request) -> Response:
        return JSONResponse(self._metrics.state())

    async def description(self, _: Request) -> Response:
        return JSONResponse(described())

    async def health(self, _: Request) -> Response:
        """Whether the process answers at all."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Whether a request would be answered now."""
        ready = self.service.scheduler.alive
        return JSONResponse({"status": "ready" if ready else "stopping"}, status_code=200 if ready else 503)

    async def page(self, _: Request) -> Response:
        """The page; its script asks for a key where the server wants one."""
        return HTMLResponse(files("k2lite.server").joinpath("page.html").read_text("utf-8"), headers=PAGE_HEADERS)

    def _route(self, path: str, handler: Handler, shape: ErrorBody, *, methods: list[str] | None = None) -> Route:
        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except ApiError as error:
                return error_response(error, shape)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                log.error("%s failed: %s\n%s", path, type(error).__name__, frames_of(error))
                return error_response(broken(), shape)

        return Route(path, guarded, methods=methods or ["POST"])

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        if not hmac.compare_digest(shown_key(request).encode("utf-8", "replace"), self._key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, request: Request) -> Fields:
        limit = self.service.limits.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self.service.limits.body_s):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise ApiError(413, f"the body is larger than {limit} bytes")
        except TimeoutError as error:
            raise ApiError(408, f"the body was not complete in {self.service.limits.body_s:g} seconds") from error
        if request.headers.get("content-encoding", "identity") != "identity":
            raise invalid("compressed bodies are not taken")
        return await run_in_threadpool(parse_object, bytes(body), max_depth=self.service.limits.max_depth)

    async def _whole(
        self, request: Request, prepared: AnswerRequest, collect: Callable[[Answer], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """The whole answer, given up when the client goes."""
        async with self.service.answer(prepared, client_of(request)) as answer:
            work = asyncio.ensure_future(collect(answer))
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                return work.result()
            finally:
                work.cancel()
                gone.cancel()

    async def _stream(
        self, request: Request, prepared: AnswerRequest, write: Callable[[Answer], AsyncIterator[str]]
    ) -> StreamingResponse:
        """Server-sent events. What can be refused is refused before the first byte."""
        running = self.service.answer(prepared, client_of(request))
        return _Events(running, write(await running.__aenter__()))


class _Events(StreamingResponse):
    """Leaves the answer's block however the response ends, so that a client that is gone frees its slot at once."""

    def __init__(self, running: AbstractAsyncContextManager[Answer], texts: AsyncIterator[str]) -> None:
        super().__init__(texts, media_type="text/event-stream", headers=NO_CACHE)
        self._running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._running.__aexit__(None, None, None)


def shown_key(request: Request) -> str:
    """The key that a client shows in either API's way; empty without one."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    return request.headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")


def client_of(request: Request) -> str:
    """Who asks, for a fair queue: an address, and on one machine the key, which each program chooses for itself where
    none is demanded."""
    return f"{request.client.host if request.client else ''} {shown_key(request)}"


def _include_usage(fields: Fields) -> bool:
    options = fields.object("stream_options")
    return options is not None and options.boolean("include_usage")


async def _no_such_page(_: Request, error: Exception) -> Response:
    """404 and 405 in JSON: a client may be looking at it."""
    status = getattr(error, "status_code", 404)
    return error_response(ApiError(status, "there is nothing here for this method"), openai_chat.error_body)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(error: ApiError, shape: ErrorBody) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(shape(error), status_code=error.status, headers=headers)
