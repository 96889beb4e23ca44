"""Routes, keys, body limits and disconnects: the outside of the server.

Built on Starlette (routing, streaming) and run by uvicorn: both small, long kept, and without a framework's own ideas of
validation, which must answer in each API's own shape here.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import openai_chat
from .answering import AnswerRequest
from .errors import ApiError, broken, invalid
from .fields import Fields, parse_object
from .service import Answer, Service

ErrorBody = Callable[[ApiError], dict[str, Any]]
Handler = Callable[[Request], Awaitable[Response]]
NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
log = logging.getLogger("k2lite.server")


class Server:
    """The routes of one service; `key` is what clients must show, None if nothing."""

    def __init__(self, service: Service, *, key: str | None = None) -> None:
        self.service = service
        self._key = key

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and ends the scheduler."""
        routes = [
            self._route("/v1/chat/completions", self.chat, openai_chat.error_body),
            self._route("/v1/models", self.models, openai_chat.error_body, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

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
        options = fields.object("stream_options")
        include_usage = options is not None and options.boolean("include_usage")
        return await self._stream(prepared, lambda answer: writer.stream(answer, include_usage=include_usage))

    async def models(self, _: Request) -> Response:
        context = self.service.engine.placement.context_tokens
        model = {
            "id": self.service.name,
            "object": "model",
            "created": self.service.started_s,
            "owned_by": "k2lite",
            "max_model_len": context,
        }
        return JSONResponse({"object": "list", "data": [model]})

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
                log.error("%s failed: %s", path, type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
                return error_response(broken(), shape)

        return Route(path, guarded, methods=methods or ["POST"])

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = request.headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        if not hmac.compare_digest(shown.encode("utf-8", "replace"), self._key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, request: Request) -> Fields:
        limit = self.service.limits.max_body_bytes
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise ApiError(413, f"the body is larger than {limit} bytes")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise invalid("compressed bodies are not taken")
        return await run_in_threadpool(parse_object, bytes(body), max_depth=self.service.limits.max_depth)

    async def _whole(
        self, request: Request, prepared: AnswerRequest, collect: Callable[[Answer], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """The whole answer, given up when the client goes."""
        async with self.service.answer(prepared) as answer:
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
        self, prepared: AnswerRequest, write: Callable[[Answer], AsyncIterator[str]]
    ) -> StreamingResponse:
        """Server-sent events. What can be refused is refused before the first byte."""
        running = self.service.answer(prepared)
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


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(error: ApiError, shape: ErrorBody) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(shape(error), status_code=error.status, headers=headers)
