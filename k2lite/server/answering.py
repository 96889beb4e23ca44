"""What is asked of the scheduler, and what it hands back while it works. Knows no API and no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from k2lite.sampling import SamplingParams
from k2lite.text.answer_reader import AnswerReader, Event

FinishReason = Literal["stop", "length", "tool_calls"]


class Constraint(Protocol):
    """What decoding may write. For each token: `forced`, or a token chosen by `allows` and `mask`; then `accept`.
    `left` tokens may still be made."""

    def forced(self, left: int) -> int | None:
        """The one token that must come next; None where there is a choice."""

    def allows(self, token: int, left: int) -> bool:
        """Whether a token may come: those that `mask` has, and other spellings of a text for which it has one."""

    def mask(self, left: int) -> torch.Tensor:
        """bool [vocab], true where a token is allowed."""

    def accept(self, token: int, left: int) -> int:
        """The token that is written: `token`, or one that leads to a valid end where `left` would not suffice."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""


@dataclass(frozen=True)
class TokenRecord:
    """A token of the answer with its log-probability (natural) and those of the likeliest alternatives."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Piece:
    """News of an answer: events, and the tokens behind them if log-probabilities were asked for."""

    events: Sequence[Event]
    records: Sequence[TokenRecord] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer."""

    reason: FinishReason
    stop_sequence: str | None = None


@dataclass(frozen=True)
class Failure:
    """The engine failed at this request, and at no other."""

    error: BaseException


News = Piece | Finish | Failure


@dataclass
class AnswerRequest:
    """Everything that decides an answer. `top_logprobs` is None where no log-probabilities are wanted."""

    ids: list[int]
    params: SamplingParams
    max_tokens: int
    reader: AnswerReader
    constraint: Constraint | None = None
    top_logprobs: int | None = None


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(eq=False)
class Job:
    """A request on its way, of one of the clients that take turns. `tell` is called in the scheduler's thread;
    `cancelled` may be set from any."""

    request: AnswerRequest
    tell: Callable[[News], None]
    client: str = ""
    usage: Usage = field(default_factory=Usage)
    cancelled: bool = False
