"""From a checked conversation to a job, and from a job to news: what all APIs share. Knows no API's shapes."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from k2lite.engine import Engine
from k2lite.errors import ContextLengthError, RequestError, TokenizerError
from k2lite.grammar.answer_constraint import MAX_CALLS, AnswerConstraint, Rules
from k2lite.grammar.json_writer import Grammars
from k2lite.grammar.schema_judging import UnsupportedSchema
from k2lite.grammar.vocabulary import Vocabulary
from k2lite.sampling import SamplingParams
from k2lite.text.answer_reader import AnswerReader, ControlIds

from .answering import AnswerRequest, Failure, Finish, Job, News, Usage
from .conversation import Conversation, with_canonical_ids
from .errors import broken, busy, invalid
from .prefix_cache import PrefixCache
from .prefix_store import PrefixStore
from .scheduler import Scheduler


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    slots: int = 4
    queue: int = 32
    max_body_bytes: int = 32 << 20
    body_s: float = 60.0  # in which a body must be complete
    max_depth: int = 64
    max_messages: int = 20_000
    max_tools: int = 512
    kept_prefixes: int = 4


@dataclass(frozen=True)
class Wanted:
    """How a client wants its answer, whichever API it speaks."""

    max_tokens: int | None = None
    sampling: Mapping[str, Any] | None = None  # fields of SamplingParams that it names
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    schema: Mapping[str, Any] | None = None  # of the whole answer; {} is any JSON object


class Service:
    """An engine that answers."""

    def __init__(
        self, engine: Engine, *, name: str, limits: Limits | None = None, store: PrefixStore | None = None
    ) -> None:
        """store: where prefixes are kept beyond memory; without it they are forgotten with the process."""
        self.engine = engine
        self.name = name
        self.limits = limits or Limits()
        self.started_s = int(time.time())
        self.control = ControlIds(engine.tokenizer)
        self.vocabulary = Vocabulary(engine.tokenizer, engine.config.vocab_size)
        self.grammars = Grammars(self.vocabulary)
        self._posted: _Post | None = None
        prefixes = PrefixCache(engine, keep=self.limits.kept_prefixes, store=store)
        self.scheduler = Scheduler(engine, slots=self.limits.slots, queue=self.limits.queue, prefixes=prefixes)

    def prompt_ids(self, conversation: Conversation) -> tuple[list[int], int]:
        """The rendered conversation and the number of calls in it. Raises ApiError."""
        conversation.check()
        messages, calls = with_canonical_ids(conversation.messages)
        declared = [dict(tool.declaration) for tool in conversation.tools]
        try:
            prompt = self.engine.tokenizer.render(
                messages,
                declared or None,
                thinking=conversation.thinking,
                preserve_thinking=conversation.preserve_thinking,
            )
        except TokenizerError as error:
            # a template's own message may hold what the user wrote, or where it lies
            raise invalid("the model's chat template does not take these messages", "messages") from error
        return prompt.ids, calls

    def prepare(self, conversation: Conversation, wanted: Wanted) -> AnswerRequest:
        """Check everything and build the request. Raises ApiError before any work of the engine."""
        ids, calls = self.prompt_ids(conversation)
        thinks = bool(ids) and ids[-1] == self.control.think_begin
        reader = AnswerReader(
            self.engine.tokenizer,
            thinks=thinks,
            stop=wanted.stop,
            tools={tool.name: tool.parameters for tool in conversation.tools},
            first_call=calls,
        )
        return self._request(ids, reader, wanted, self._rules(conversation, wanted, calls), thinks=thinks)

    def _rules(self, conversation: Conversation, wanted: Wanted, calls: int) -> Rules:
        """What the answer may be made of. Raises ApiError for a schema that can't be kept."""
        choice = conversation.tool_choice
        chosen = [tool for tool in conversation.tools if not choice.startswith("=") or tool.name == choice[1:]]
        chosen = [] if choice == "none" else chosen
        if chosen and not self.control.can_call:
            raise invalid("this model's tokenizer has no tokens for tool calls", "tools")
        tools = {}
        for tool in chosen:
            try:
                tools[tool.name] = self.grammars.of(tool.parameters)
            except UnsupportedSchema as error:
                raise invalid(f"tool {tool.name}: {error}", "tools") from error
        try:
            text = None if wanted.schema is None else self.grammars.of(wanted.schema)
        except UnsupportedSchema as error:
            raise invalid(f"response_format: {error}", "response_format") from error
        call = "never" if not tools else "may" if choice == "auto" else "must"
        most = MAX_CALLS if conversation.parallel_calls and not choice.startswith("=") else 1
        return Rules(tools, call, most, text, calls)

    def prepare_text(self, ids: list[int], wanted: Wanted) -> AnswerRequest:
        """A plain continuation of `ids`."""
        return self._request(
            ids, AnswerReader(self.engine.tokenizer, stop=wanted.stop), wanted, Rules({}), thinks=False
        )

    def _request(
        self, ids: list[int], reader: AnswerReader, wanted: Wanted, rules: Rules, *, thinks: bool
    ) -> AnswerRequest:
        try:
            tokens = self.engine.check_request(len(ids), wanted.max_tokens)
            params = self._sampling(wanted.sampling or {})
        except ContextLengthError as error:
            raise invalid(str(error), "messages", code="context_length_exceeded") from error
        except RequestError as error:
            raise invalid(str(error)) from error
        may_think = self.control.think_begin is not None and ids[-1] != self.control.think_end
        constraint = AnswerConstraint(
            self.vocabulary, self.control, rules, self.engine.stop_ids, thinks=thinks, may_think=may_think
        )
        if constraint.shortest() > tokens:
            raise invalid(
                f"the shortest valid answer takes {constraint.shortest()} tokens and {tokens} are allowed: "
                "raise max_tokens or simplify the schema",
                "max_tokens",
            )
        return AnswerRequest(ids, params, tokens, reader, constraint, wanted.top_logprobs)

    def _sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        named = {name: value for name, value in given.items() if value is not None}
        return replace(self.engine.recommended_sampling, **{"seed": secrets.randbits(32), **named})

    def _post(self) -> _Post:
        loop = asyncio.get_running_loop()
        if self._posted is None or self._posted.loop is not loop:
            self._posted = _Post(loop)
        return self._posted

    @asynccontextmanager
    async def answer(self, request: AnswerRequest, client: str = "") -> AsyncIterator[Answer]:
        """Run a request; leaving the block cancels what is not done. Clients take turns where requests wait. Raises
        ApiError 429 where the queue is full."""
        answer = Answer(request, client, self._post())
        if not self.scheduler.submit(answer.job):
            if not self.scheduler.alive:
                raise broken()
            waiting = self.scheduler.waiting + self.scheduler.running
            raise busy(f"{waiting} requests are in progress or waiting; try again", 1 + waiting)
        try:
            yield answer
        finally:
            if not answer.done:
                self.scheduler.cancel(answer.job)


class Answer:
    """Iterate for news; `usage` grows with it."""

    def __init__(self, request: AnswerRequest, client: str, post: _Post) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: deque[News] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.done = False

        def tell(news: News) -> None:
            if not post.bring(self, news):
                self.job.cancelled = True

        self.job = Job(request, tell, client, Usage(prompt_tokens=len(request.ids)))
        self.usage = self.job.usage

    def take(self, news: News) -> None:
        """Called in the event loop."""
        self._news.append(news)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[News]:
        while not self.done:
            if not self._news:
                self._waiter = self._loop.create_future()
                await self._waiter
            news = self._news.popleft()
            self.done = isinstance(news, Finish | Failure)
            if isinstance(news, Failure):
                raise broken() from news.error
            yield news


class _Post:
    """Brings news from the scheduler's thread into the event loop: one wake-up for all that lies here when it looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lying: deque[tuple[Answer, News]] = deque()
        self._rung = False

    def bring(self, answer: Answer, news: News) -> bool:
        """False where the loop has ended, and with it everyone who listens."""
        self._lying.append((answer, news))
        if not self._rung:
            self._rung = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._rung = False
                return False
        return True

    def _deliver(self) -> None:
        self._rung = False  # before looking: what comes from here on rings again
        while self._lying:
            answer, news = self._lying.popleft()
            answer.take(news)
