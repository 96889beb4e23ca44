"""What an answer may be made of: free text, calls of declared tools with valid arguments, or JSON of a schema.

For each token: `forced`, else a draw that `allows` judges, else a draw under `mask`; then `accept`.

Invariant: at every point the tokens that are left suffice for a valid end; a token after which they would not is
replaced by the first of the shortest end, which is then written out. So every opened call is completed, and is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch

from k2lite.quant.errors import RequestError
from k2lite.text.answer_reader import ControlIds

from .json_writer import Grammar, JsonWriter
from .vocabulary import Mask, Vocabulary

MAX_ARGUMENT_TOKENS = 32 * 1024  # of one call: bounds its strings, arrays and depth together
MAX_CALLS = 128


@dataclass(frozen=True)
class Rules:
    """What is allowed. `tools` are the declared ones that may be called, `call` whether one must be ("must"), may be
    ("may") or must not ("never"); `text` is the grammar of the text, None for free text."""

    tools: dict[str, Grammar]
    call: str = "never"
    max_calls: int = MAX_CALLS
    text: Grammar | None = None
    first_call: int = 0


class _At(Enum):
    THOUGHT = auto()
    TEXT = auto()
    SECTION = auto()  # between calls
    NAME = auto()
    NUMBER = auto()
    ARGUMENTS = auto()
    END = auto()


class AnswerConstraint:
    """`left` is always the number of tokens that may still be made. `stop_ids` end an answer."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        control: ControlIds,
        rules: Rules,
        stop_ids: frozenset[int],
        *,
        thinks: bool,
        may_think: bool = False,
    ) -> None:
        self._vocabulary, self._control, self._rules, self._stop_ids = vocabulary, control, rules, stop_ids
        self._at = _At.THOUGHT if thinks else _At.TEXT
        self._may_think = may_think and not thinks  # the model writes <think> itself
        self._plan: list[int] = []  # tokens that are already decided
        self._leaving = False  # the plan is the shortest end
        self._name = b""
        self._calls = 0
        self._spent = 0  # tokens of the present call's arguments
        self._writer: JsonWriter | None = None
        self._structural = sorted(
            token
            for token in (
                control.section_begin,
                control.section_end,
                control.call_begin,
                control.call_end,
                control.arguments,
            )
            if token is not None
        )
        self._names = {name: f"functions.{name}:".encode() for name in rules.tools}
        self._endings = {name: self._call_tokens(name) for name in rules.tools}
        self._free: Mask | None = None  # what free text may be of
        self._free_call = np.empty(0, dtype=np.bool_)  # and where a call may begin too

    @property
    def finished(self) -> bool:
        return self._at is _At.END

    def shortest(self) -> int:
        """Tokens that the shortest valid answer takes, its end of turn not counted."""
        if self._rules.call == "must":
            return len(self._forced_call()) + (self._at is _At.THOUGHT)
        if self._rules.text is not None:
            return len(self._rules.text.shortest_ids) + (self._at is _At.THOUGHT)
        return 0

    def forced(self, left: int) -> int | None:
        """The one token that must come next; None where there is a choice."""
        if not self._plan and left <= self._needed_now():
            self._leave()
        return self._plan[0] if self._plan else None

    def allows(self, token: int, left: int) -> bool:
        """Whether a token may come: those that `mask` has, and other spellings of a text for which it has one. Asked
        where nothing is forced."""
        if self._is_free():
            return bool(self._free_text(left)[token])
        writer = self._writer
        if writer is None or (self._at is _At.TEXT and not writer.begun):
            return bool(self._allowed(left)[token])
        ends = token == self._control.call_end if self._at is _At.ARGUMENTS else token in self._stop_ids
        return writer.complete() if ends else writer.allows(token)

    def mask(self, left: int) -> torch.Tensor:
        """bool [vocab], true where a token is allowed: what is forced alone."""
        if self.forced(left) is not None:
            return self._only(self._plan[0])
        if self._is_free():
            return torch.from_numpy(self._free_text(left))
        allowed = self._allowed(left)
        if not allowed.any():
            self._leave()
            return self._only(self._plan[0])
        return torch.from_numpy(allowed)

    def _is_free(self) -> bool:
        return self._at is _At.TEXT and self._rules.text is None and self._rules.call != "must"

    def accept(self, token: int, left: int) -> int:
        """Write `token`, or the first of the shortest end if the rest would not fit into `left` - 1 tokens."""
        if not self._plan:
            if self._try(token, left - 1):
                return token
            self._leave()
        token = self._plan.pop(0)
        self._write(token)
        if self._leaving and not self._plan:
            self._at = _At.END
        return token

    def _leave(self) -> None:
        self._plan, self._leaving = self._way_out(), True
        if not self._plan:
            raise RequestError("no valid token is possible")

    def _call_tokens(self, name: str) -> int:
        """Most tokens that a whole call of a tool takes: begin, name, number, mark, arguments, end."""
        header = self._vocabulary.tokens_of(self._names[name])
        return len(header) + len(self._number()) + len(self._rules.tools[name].shortest_ids) + 3

    def _number(self) -> list[int]:
        return self._vocabulary.tokens_of(str(self._rules.first_call + self._calls).encode())

    def _forced_call(self) -> list[int]:
        """A whole section with the shortest call."""
        control = self._control
        return _known([control.section_begin, *self._shortest_call(), control.section_end])

    def _shortest_call(self, names: Sequence[str] | None = None, written: bytes = b"") -> list[int]:
        name = min(names or self._endings, key=lambda name: self._endings[name])
        control, grammar = self._control, self._rules.tools[name]
        header = self._vocabulary.tokens_of(self._names[name][len(written) :])
        begin = [] if written or self._at is _At.NAME else [control.call_begin]
        return _known([*begin, *header, *self._number(), control.arguments, *grammar.shortest_ids, control.call_end])

    def _needed_now(self) -> int:
        """Tokens that must still be there before the next one, so that a must is kept."""
        if self._at in (_At.THOUGHT, _At.TEXT) and (self._rules.call == "must" or self._rules.text is not None):
            if self._writer is not None and self._rules.call != "must":
                return 0  # `accept` looks ahead by itself
            return self.shortest()
        return 0

    def _way_out(self) -> list[int]:
        """The shortest valid end from here."""
        control, at = self._control, self._at
        end = _known([control.section_end]) if at in (_At.SECTION, _At.NAME, _At.NUMBER, _At.ARGUMENTS) else []
        if at in (_At.THOUGHT, _At.TEXT):
            thought = _known([control.think_end]) if at is _At.THOUGHT else []
            if self._rules.call == "must":
                return [*thought, *self._forced_call()]
            if self._writer is not None:
                return self._writer.ending(self._writer.state)
            return [*thought, *self._rules.text.shortest_ids] if self._rules.text is not None else []
        if at is _At.SECTION:
            return end if self._calls else [*self._shortest_call(), *end]
        if at is _At.NAME:
            return [*self._shortest_call(self._candidates(self._name), self._name), *end]
        assert self._writer is not None
        return [*self._writer.ending(self._writer.state), *_known([control.call_end]), *end]

    def _candidates(self, written: bytes) -> list[str]:
        return [name for name, header in self._names.items() if header.startswith(written)]

    def _allowed(self, left: int) -> Mask:
        if self._at is _At.ARGUMENTS:
            assert self._writer is not None
            going_on = self._writer.mask()
            going_on[_known([self._control.call_end])] = self._writer.complete()
            return going_on
        allow = np.zeros(self._vocabulary.size, dtype=np.bool_)
        control, at = self._control, self._at
        if at is _At.THOUGHT:
            allow[:] = self._vocabulary.ordinary
            allow[_known([control.think_end])] = True
            if self._rules.call == "may" and self._rules.text is None and self._call_fits(left):
                allow[_known([control.section_begin])] = True
            if self._rules.call != "must" and self._rules.text is None:
                allow[sorted(self._stop_ids)] = True
        elif at is _At.TEXT and self._rules.call == "must":
            allow[_known([control.section_begin, control.think_begin if self._may_think_now(left) else None])] = True
        elif at is _At.TEXT:
            self._allow_json(allow, left)
        elif at is _At.SECTION:
            allow[_known([control.section_end])] = self._calls > 0
            more = self._calls < self._rules.max_calls and self._call_fits(left + 1)
            allow[_known([control.call_begin])] = more or not self._calls
        elif at is _At.NAME:
            for token, text in self._header_tokens():
                allow[token] = any(header.startswith(self._name + text) for header in self._names.values())
        return allow

    def _may_think_now(self, left: int) -> bool:
        """Whether there is room for opening a thought, closing it, and the shortest end behind it."""
        return self._may_think and left >= self.shortest() + 2

    def _allow_json(self, allow: Mask, left: int) -> None:
        writer = self._text_writer()
        if not writer.begun:
            if self._rules.call == "may" and self._call_fits(left):
                allow[_known([self._control.section_begin])] = True
            if self._may_think_now(left):
                allow[_known([self._control.think_begin])] = True
        allow |= writer.mask()
        if writer.complete():
            allow[sorted(self._stop_ids)] = True

    def _text_writer(self) -> JsonWriter:
        assert self._rules.text is not None
        if self._writer is None:
            self._writer = JsonWriter(self._rules.text)
        return self._writer

    def _header_tokens(self) -> list[tuple[int, bytes]]:
        """Tokens that may go on with a name: those that are parts of one."""
        rests = [header[len(self._name) :] for header in self._names.values() if header.startswith(self._name)]
        firsts = {rest[:size] for rest in rests for size in range(1, len(rest) + 1)}
        return [(token, text) for text in firsts if (token := self._vocabulary.ids.get(text)) is not None]

    def _free_text(self, left: int) -> Mask:
        """Everything but the tokens that structure calls; a section may begin where a call may and fits."""
        if self._free is None:
            control = self._control
            ends = [token for token in self._stop_ids if token < self._vocabulary.size]
            self._free = self._vocabulary.ordinary.copy()
            self._free[[*ends, *_known([control.think_begin, control.think_end])]] = True
            self._free[self._structural] = False
            self._free_call = self._free.copy()
            self._free_call[_known([control.section_begin])] = True
        return self._free_call if self._rules.call == "may" and self._call_fits(left) else self._free

    def _call_fits(self, left: int) -> bool:
        """Whether a section with one call fits into what is left."""
        return bool(self._endings) and min(self._endings.values()) + 2 <= left

    def _only(self, token: int) -> torch.Tensor:
        mask = torch.zeros(self._vocabulary.size, dtype=torch.bool)
        mask[token] = True
        return mask

    def _try(self, token: int, room: int) -> bool:
        """Write a token if a valid end fits into `room` tokens after it."""
        control, at = self._control, self._at
        if at is _At.ARGUMENTS and token == control.call_end:
            if self._writer is None or not self._writer.complete() or room < 1:
                return False
        elif at is _At.ARGUMENTS or (at is _At.TEXT and self._writer is not None and self._vocabulary.texts[token]):
            assert self._writer is not None
            state = self._writer.after(token)
            closing = 2 if at is _At.ARGUMENTS else 0
            left = min(room, MAX_ARGUMENT_TOKENS - self._spent) if at is _At.ARGUMENTS else room
            if state is None or not self._writer.ending_fits(state, left - closing):
                return False
        elif at is _At.NAME:
            written = self._name + self._vocabulary.texts[token]
            names = self._candidates(written)
            if not names or len(self._shortest_call(names, written)) + 1 > room:
                return False
        elif at is _At.SECTION and token == control.call_begin and min(self._endings.values()) > room:
            return False
        self._write(token)
        return True

    def _write(self, token: int) -> None:
        control, at = self._control, self._at
        if at is _At.THOUGHT and token == control.think_end:
            self._at = _At.TEXT
        elif at is _At.TEXT and self._may_think and token == control.think_begin:
            self._at, self._may_think, self._writer = _At.THOUGHT, False, None
        elif at in (_At.THOUGHT, _At.TEXT) and token == control.section_begin:
            self._at, self._writer = _At.SECTION, None
        elif at is _At.SECTION:
            self._at, self._name = (_At.NAME, b"") if token == control.call_begin else (_At.END, b"")
            self._name_the_only_one()
        elif at is _At.NAME:
            self._name += self._vocabulary.texts[token]
            self._name_the_only_one()
        elif at is _At.NUMBER:
            self._at = _At.ARGUMENTS if token == control.arguments else at
        elif at is _At.ARGUMENTS and token == control.call_end:
            self._at, self._writer = _At.SECTION, None
            self._calls += 1
            self._endings = {name: self._call_tokens(name) for name in self._endings}
        elif at is _At.ARGUMENTS or (at is _At.TEXT and self._rules.text is not None):
            self._write_json(token)

    def _name_the_only_one(self) -> None:
        """Once a name is decided, so are the rest of it, the number and the mark. No name begins another: all end with
        a colon."""
        names = self._candidates(self._name) if self._at is _At.NAME else []
        if len(names) != 1:
            return
        rest = self._names[names[0]][len(self._name) :]
        if not rest:
            self._at, self._writer, self._spent = _At.NUMBER, JsonWriter(self._rules.tools[names[0]]), 0
        if not self._plan:
            self._plan = _known([*self._vocabulary.tokens_of(rest), *self._number(), self._control.arguments])

    def _write_json(self, token: int) -> None:
        writer = self._writer or self._text_writer()
        state = writer.after(token)
        if state is not None:  # None: a stop id
            writer.commit(token, state)
            self._spent += 1
            self._may_think = False
            if self._at is _At.TEXT and not writer.continues():
                self._at = _At.END


def _known(ids: Sequence[int | None]) -> list[int]:
    """Ids of which none is missing: a tokenizer without them is refused before a constraint is made."""
    return [token for token in ids if token is not None]
