"""Several requests through one engine: every step takes a token of each answer in progress and a share of the prompts.

Invariant: one thread alone touches the engine, and an answer's tokens don't depend on what else is in progress (the
engine's promise). Clients take turns; a job that fails or is cancelled leaves at the next step.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from k2lite.engine import Chunk, Engine, Sequence
from k2lite.quant.errors import K2LiteError
from k2lite.sampling import Token, sample, sample_allowed
from k2lite.text.answer_reader import State

from .answering import Failure, Finish, Job, News, Piece, TokenRecord
from .errors import frames_of
from .fair_queue import FairQueue
from .prefix_cache import PrefixCache

PROMPT_TOKENS_A_STEP = 512
log = logging.getLogger("k2lite.server")


@dataclass
class Totals:
    """Counted since the start, for /metrics."""

    requests: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    decode_rate: float = 0.0  # tokens/s of late, all answers together


@dataclass(eq=False)
class _Active:
    job: Job
    sequence: Sequence
    todo: list[int]  # tokens that are not in the cache yet
    made: list[int] = field(default_factory=list)
    arriving: Future[None] | None = None  # while it runs, what is stored of the prompt comes into the sequence

    @property
    def left(self) -> int:
        return self.job.request.max_tokens - len(self.made)


class Scheduler:
    """`slots` answers at a time, `queue` more waiting; what comes then is refused by `submit`."""

    def __init__(self, engine: Engine, *, slots: int, queue: int, prefixes: PrefixCache) -> None:
        self.engine = engine
        self.slots = slots
        self.totals = Totals()
        self.prefixes = prefixes
        self._waiting = FairQueue(queue)
        self._active: list[_Active] = []
        self._news = threading.Condition()
        self._closing = False
        self._told: list[tuple[Job, News]] = []
        self._thread = threading.Thread(target=self._run, name="k2lite-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Cancel what is in progress and end the thread."""
        with self._news:
            self._closing = True
            for job in [*self._waiting.jobs, *(active.job for active in self._active)]:
                job.cancelled = True
            self._news.notify()
        self._thread.join()
        self.prefixes.close()

    def submit(self, job: Job) -> bool:
        """Queue a job; False if the queue is full."""
        with self._news:
            free = self.slots - len(self._active)
            if self._closing or not self._waiting.add(job, free):
                self.totals.refused += 1
                return False
            self.totals.requests += 1
            self._news.notify()
            return True

    def cancel(self, job: Job) -> None:
        """The client is gone: the slot is free at the next step."""
        with self._news:
            job.cancelled = True
            self._news.notify()

    @property
    def waiting(self) -> int:
        return len(self._waiting.jobs)

    @property
    def running(self) -> int:
        return len(self._active)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def _run(self) -> None:
        """Until `close`. If this thread fails, nobody is left waiting, and `submit` takes nothing more."""
        try:
            self._work()
        except BaseException as error:
            with self._news:
                self._closing = True
                jobs = [*self._waiting.jobs, *(active.job for active in self._active)]
            for job in jobs:
                self._report(job, error)
            self._deliver()
            raise

    def _work(self) -> None:
        while True:
            with self._news:
                while self._nothing_to_do():
                    self._news.wait()
                self._take_arrived()
                self._drop_cancelled()
                admitted = self._take_waiting()
                if self._closing and not self._active and not admitted:
                    return
            for job in admitted:
                self._guarded(job, lambda job=job: self._admit(job))
            if any(active.arriving is None for active in self._active):
                self._step()
            self._deliver()

    def _nothing_to_do(self) -> bool:
        """Nobody can be admitted, and all who are wait for the drive."""
        if self._waiting.jobs and len(self._active) < self.slots:
            return False
        if any(active.arriving is None or active.arriving.done() for active in self._active):
            return False
        return bool(self._active) or not self._closing

    def _take_arrived(self) -> None:
        for active in self._active:
            if active.arriving is not None and active.arriving.done():
                error, active.arriving = active.arriving.exception(), None
                if error is not None:
                    log.error("a stored prefix could not be used: %s", type(error).__name__)
                self._known(active)

    def _drop_cancelled(self) -> None:
        gone = [a for a in self._active if (a.job.cancelled or self._closing) and a.arriving is None]
        for active in gone:
            self._retire(active)
        self.totals.cancelled += len(gone) + self._waiting.drop_cancelled()

    def _take_waiting(self) -> list[Job]:
        if not self._waiting.jobs:
            return []
        return self._waiting.take(self.slots - len(self._active), [active.job.client for active in self._active])

    def _admit(self, job: Job) -> None:
        ids = job.request.ids
        sequence, arriving = self.prefixes.take(ids, lambda: job.cancelled or self._closing)
        job.usage.prompt_tokens = len(ids)
        self.totals.prompt_tokens += len(ids)
        active = _Active(job, sequence, [], arriving=arriving)
        self._active.append(active)
        if arriving is None:
            self._known(active)
        else:
            arriving.add_done_callback(self._wake)

    def _known(self, active: _Active) -> None:
        """What is known of the prompt is in the sequence; the rest is to be done."""
        known = len(active.sequence.ids)
        active.todo = active.job.request.ids[known:]
        active.job.usage.cached_tokens = known
        self.totals.cached_tokens += known

    def _wake(self, _: object) -> None:
        with self._news:
            self._news.notify()

    def _step(self) -> None:
        began = time.perf_counter()
        chunks: dict[_Active, Chunk] = {}
        for active, share in zip(self._active, self._shares(), strict=True):
            if share:
                last = share == len(active.todo)
                chunks[active] = Chunk(active.sequence, active.todo[:share], "last" if last else "none")
        before = self.totals.completion_tokens
        for active, logits in self._stepped(chunks):
            del active.todo[: len(chunks[active].ids)]
            if logits.shape[0]:
                self._guarded(active.job, lambda a=active, row=logits[0]: self._choose(a, row))
        seconds = time.perf_counter() - began
        self.totals.steps += 1
        self.totals.step_s += seconds
        made = self.totals.completion_tokens - before
        self.totals.decode_rate += 0.1 * (made / seconds - self.totals.decode_rate)

    def _shares(self) -> list[int]:
        """Tokens each active job may bring into the next step: answers first, with one each at least, then prompts in
        turn until it is full."""
        plan = self.engine.placement
        # experts that come from the drive are read once a step, so a prompt brings all that the plan has room for
        room = (
            min(PROMPT_TOKENS_A_STEP, plan.prefill_chunk_tokens) if plan.everything_fits else plan.prefill_chunk_tokens
        )
        room = max(1, room - self.slots)
        shares = [0] * len(self._active)
        for at, active in sorted(enumerate(self._active), key=lambda place: not place[1].made):
            own = int(bool(active.made) or len(active.todo) == 1)  # what a slot is sure of
            shares[at] = min(len(active.todo), room + own)
            room -= max(0, shares[at] - own)
        return shares

    def _stepped(self, chunks: dict[_Active, Chunk]) -> list[tuple[_Active, torch.Tensor]]:
        """Logits of each chunk. If the step fails, each chunk goes alone, so that only who is at fault fails."""
        if not chunks:
            return []
        try:
            return list(zip(chunks, self.engine.step(list(chunks.values())), strict=True))
        except Exception as error:
            if len(chunks) == 1:
                self._fail(next(iter(chunks)), error)
                return []
        return [result for active, chunk in chunks.items() for result in self._stepped({active: chunk})]

    def _choose(self, active: _Active, logits: torch.Tensor) -> None:
        """Write the next token, and with it those that leave no choice: they go into one step."""
        constraint = active.job.request.constraint
        going_on = self._write(active, self._next(active, logits), logits)
        while going_on and constraint and active.job.request.top_logprobs is None:
            forced = constraint.forced(active.left)
            if forced is None:
                break
            going_on = self._write(active, forced, logits)

    def _next(self, active: _Active, logits: torch.Tensor) -> int:
        """A token drawn from logits, or the one that must come."""
        params, position, left = active.job.request.params, len(active.sequence.ids), active.left
        constraint = active.job.request.constraint
        if constraint is None:
            return sample(logits, params, position)
        forced = constraint.forced(left)
        if forced is not None:
            return forced
        allows, mask = partial(constraint.allows, left=left), partial(constraint.mask, left)
        return sample_allowed(logits, params, position, allows, mask)

    def _write(self, active: _Active, token: int, logits: torch.Tensor) -> bool:
        """Take a token into the answer; whether the answer goes on."""
        request, reader = active.job.request, active.job.request.reader
        constraint = request.constraint
        chosen = constraint.accept(int(token), active.left) if constraint else int(token)
        active.made.append(chosen)
        self.totals.completion_tokens += 1
        usage = active.job.usage
        usage.completion_tokens += 1
        if chosen in self.engine.stop_ids:
            self._finish(active, reader.flush())
            return False
        usage.reasoning_tokens += reader.state is State.REASONING
        spoken = reader.state is State.TEXT
        events = reader.feed(chosen)
        records = []
        if spoken and request.top_logprobs is not None:
            records = [self._record(token, chosen, logits, request.top_logprobs)]
        if reader.stopped is not None or not active.left or (constraint and constraint.finished):
            self._finish(active, [*events, *reader.flush()], records)
            return False
        if events or records:
            self._tell(active.job, Piece(events, records))
        active.todo.append(chosen)
        return True

    def _record(self, token: int, chosen: int, logits: torch.Tensor, count: int) -> TokenRecord:
        if not count and chosen == token and isinstance(token, Token):
            return TokenRecord(chosen, token.logprob)
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        values, ids = torch.topk(logprobs, min(count, len(logprobs)))
        return TokenRecord(chosen, float(logprobs[chosen]), list(zip(ids.tolist(), values.tolist(), strict=True)))

    def _finish(self, active: _Active, events: list, records: list[TokenRecord] | None = None) -> None:  # type: ignore[type-arg]
        reader, request = active.job.request.reader, active.job.request
        if events or records:
            self._tell(active.job, Piece(events, records or []))
        ended = active.made[-1] in self.engine.stop_ids or reader.stopped is not None
        done = ended or (request.constraint is not None and request.constraint.finished)
        reason = ("tool_calls" if reader.calls else "stop") if done else "length"
        self._retire(active)
        self.totals.finished += 1
        self._tell(active.job, Finish(reason, reader.stopped))  # type: ignore[arg-type]

    def _retire(self, active: _Active) -> None:
        self._active.remove(active)
        self.prefixes.give_back(active.sequence)

    def _guarded(self, job: Job, act) -> None:  # type: ignore[no-untyped-def]
        """Do something for one job; if it fails, that job alone fails."""
        try:
            act()
        except Exception as error:
            active = next((active for active in self._active if active.job is job), None)
            if active is not None:
                self._fail(active, error)
            else:
                self._report(job, error)

    def _fail(self, active: _Active, error: Exception) -> None:
        self._active.remove(active)
        self.prefixes.drop(active.sequence)
        self._report(active.job, error)

    def _report(self, job: Job, error: BaseException) -> None:
        self.totals.failed += 1
        # the text of an error of ours holds no prompt; others may
        if isinstance(error, K2LiteError):
            log.error("a request failed: %s", error)
        else:
            log.error("a request failed: %s\n%s", type(error).__name__, frames_of(error))
        self._tell(job, Failure(error))

    def _tell(self, job: Job, news: News) -> None:
        """Have a client told at the end of the step: told now, its thread would take turns with this one."""
        self._told.append((job, news))

    def _deliver(self) -> None:
        for job, news in self._told:
            if not job.cancelled:
                job.tell(news)
        self._told.clear()
