"""An answer read token by token: what is thought, what is said, and which tools are called with what.

Structure is read from token ids, never from text, so no text can look like a call and no control token is ever part of
what is handed out. Takes every deviation that was seen in the wild (formats.md 7.6). Knows no network.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from .reasoning import BEGIN as THINK_BEGIN, END as THINK_END
from .stream import TextStream
from .tokenizer import Tokenizer

_ID = re.compile(r"(?:functions\.)?(.+):\d+")
_COUNTER = re.compile(r"\d*")


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of what the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call begins: its place in this answer, its canonical id over the whole conversation, the tool's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the arguments of call `index`, JSON."""

    index: int
    text: str


Event = Reasoning | Text | CallBegin | CallArguments


class ControlIds:
    """The ids that structure an answer; None where a tokenizer has no such token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def named(*names: str) -> int | None:
            return next((tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens), None)

        self.think_begin, self.think_end = named(THINK_BEGIN), named(THINK_END)
        # the singular forms occur in older parsers
        self.section_begin = named("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
        self.section_end = named("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
        self.call_begin, self.call_end = named("<|tool_call_begin|>"), named("<|tool_call_end|>")
        self.arguments = named("<|tool_call_argument_begin|>")
        self.all = frozenset(tokenizer.special_tokens.values())

    @property
    def can_call(self) -> bool:
        return None not in (self.section_begin, self.section_end, self.call_begin, self.call_end, self.arguments)


class State(Enum):
    """Which part of an answer the next token belongs to."""

    REASONING = auto()
    TEXT = auto()
    SECTION = auto()  # inside the section of calls or after it: text here is not for the reader
    HEADER = auto()
    ARGUMENTS = auto()


class AnswerReader:
    """Feed it ids; `state` says where the answer is, `calls` how many calls it has made, `stopped` which stop string
    ended it. `tools` maps declared names to schemas; `first_call` is the number of calls before this answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinks: bool = False,
        stop: tuple[str, ...] = (),
        tools: Mapping[str, Any] | None = None,
        first_call: int = 0,
    ) -> None:
        self.state = State.REASONING if thinks else State.TEXT
        self.calls = 0
        self._control = ControlIds(tokenizer)
        self._tokenizer = tokenizer
        self._tools = tools or {}
        self._first_call = first_call
        self._text = TextStream(tokenizer, stop=stop)
        self._said = False
        self._blank = ""
        self._pieces = codecs.getincrementaldecoder("utf-8")("replace")
        self._header = ""
        self._arguments = ""
        self._open: str | None = None  # the name of the call whose arguments come; None while it is not known

    @property
    def stopped(self) -> str | None:
        return self._text.stopped

    def feed(self, token: int) -> list[Event]:
        """What has become certain with this token."""
        return list(self._feed(token))

    def flush(self) -> list[Event]:
        """What is left at the end of the answer."""
        return list(self._leave())

    def _feed(self, token: int) -> Iterator[Event]:
        control = self._control
        if token not in control.all:
            yield from self._plain(token)
        elif token == control.think_end:
            if self.state is State.REASONING:
                yield from self._enter(State.TEXT)
        elif token == control.think_begin:
            if self.state is State.TEXT and not self._said:  # later ones are repetitions: dropped
                self._blank = ""
                yield from self._enter(State.REASONING)
        elif token in (control.section_begin, control.section_end):
            yield from self._enter(State.SECTION)
        elif token == control.call_begin:
            if self.state is State.HEADER:
                self._header = ""  # a call without arguments before the next one: the first is discarded
            yield from self._enter(State.HEADER)
        elif token == control.arguments and self.state is State.HEADER:
            yield from self._begin_arguments()
        elif token == control.call_end and self.state in (State.HEADER, State.ARGUMENTS):
            yield from self._enter(State.SECTION)

    def _plain(self, token: int) -> Iterator[Event]:
        if self.state is State.TEXT:
            yield from self._say(self._text.feed(token))
            return
        piece = self._pieces.decode(self._tokenizer.token_bytes(token))
        if self.state is State.REASONING and piece:
            yield Reasoning(piece)
        elif self.state is State.HEADER:
            self._header += piece
        elif self.state is State.ARGUMENTS:
            self._arguments += piece
            if self._open is not None and piece:
                yield CallArguments(self.calls - 1, piece)

    def _say(self, piece: str) -> Iterator[Event]:
        """White space at the beginning waits: before a call it is dropped."""
        self._blank += piece
        if self._said or self._blank.strip():
            self._said, piece, self._blank = True, self._blank, ""
            if piece:
                yield Text(piece)

    def _enter(self, state: State) -> Iterator[Event]:
        if state is State.SECTION or state is State.HEADER:
            yield from self._leave(keep_blank=False)
        else:
            yield from self._leave()
        self.state = state

    def _leave(self, *, keep_blank: bool = True) -> Iterator[Event]:
        rest = self._pieces.decode(b"", final=True)
        self._pieces.reset()
        if self.state is State.TEXT:
            yield from self._say(self._text.flush())
            if keep_blank and self._blank:
                yield Text(self._blank)
            self._blank = ""
        elif self.state is State.REASONING and rest:
            yield Reasoning(rest)
        elif self.state is State.ARGUMENTS:
            yield from self._end_arguments(rest)
        elif self.state is State.HEADER and self._header.strip():
            yield from self._begin_arguments()
            yield from self._end_arguments("")

    def _begin_arguments(self) -> Iterator[Event]:
        self.state = State.ARGUMENTS
        self._arguments, self._open = "", None
        match = _ID.fullmatch(self._header.strip())
        if match and (not self._tools or match[1] in self._tools):
            yield self._begin_call(match[1])

    def _end_arguments(self, rest: str) -> Iterator[Event]:
        self._arguments += rest
        if self._open is None:
            name = self._guess()
            if name is None:  # no call after all
                self._header, self._arguments = "", ""
                return
            yield self._begin_call(name)
            yield CallArguments(self.calls - 1, self._arguments or "{}")
        elif not self._arguments.strip():
            yield CallArguments(self.calls - 1, "{}")
        elif rest:
            yield CallArguments(self.calls - 1, rest)
        self._header, self._arguments, self._open = "", "", None

    def _begin_call(self, name: str) -> CallBegin:
        self._open = name
        self.calls += 1
        return CallBegin(self.calls - 1, f"functions.{name}:{self._first_call + self.calls - 1}", name)

    def _guess(self) -> str | None:
        """The declared tool that a damaged id means: by the arguments' names for a bare counter, else by spelling."""
        header = self._header.strip()
        if _COUNTER.fullmatch(header):
            return self._by_arguments()
        bare = re.sub(r"[\W_]*\d*$", "", re.sub(r"^functions?[._:]?", "", header))
        close = difflib.get_close_matches(bare, list(self._tools), n=1, cutoff=0.7)
        return close[0] if close else None

    def _by_arguments(self) -> str | None:
        try:
            given = set(json.loads(self._arguments or "{}"))
        except (ValueError, TypeError, RecursionError):
            return None
        fits = {
            name: len(given & set(schema.get("properties", {}))) - len(given ^ set(schema.get("properties", {})))
            for name, schema in self._tools.items()
            if isinstance(schema, Mapping)
        }
        best = [name for name, score in fits.items() if score == max(fits.values())]
        return best[0] if len(best) == 1 else None
