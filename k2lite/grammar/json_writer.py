"""One JSON text being written in tokens: which tokens may come next, and the tokens of its shortest end.

The masks are llguidance's, the judgement is the machine's: where they differed, or where llguidance gave up, the text
would still end valid. Used by one thread.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher

from .json_schema import compile_schema
from .machine import Machine, State
from .nodes import Node, to_lark
from .schema_judging import UnsupportedSchema
from .vocabulary import Mask, Vocabulary

MAX_LARK = 4 << 20


class Grammar:
    """A compiled schema."""

    def __init__(self, schema: Any, vocabulary: Vocabulary) -> None:
        self.root: Node = compile_schema(schema)
        self.vocabulary = vocabulary
        self.shortest_ids = vocabulary.tokens_of(self.root.shortest or b"")
        lark = to_lark(self.root)
        if len(lark) > MAX_LARK:
            raise UnsupportedSchema("the schema is too large for constrained decoding")
        self._first = LLMatcher(vocabulary.llguidance, LLMatcher.grammar_from_lark(lark), log_level=0)
        if self._first.is_error():
            raise UnsupportedSchema("the schema is too complex for constrained decoding")

    def matcher(self) -> LLMatcher:
        return self._first.deep_copy()


class Grammars:
    """Compiled schemas, the most recently used kept: clients send the same tools with every request."""

    def __init__(self, vocabulary: Vocabulary, *, keep: int = 512) -> None:
        self._vocabulary = vocabulary
        self._keep = keep
        self._made: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = Lock()

    def of(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of a schema. Raises UnsupportedSchema."""
        key = json.dumps(schema)
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        made = Grammar(schema, self._vocabulary)
        with self._lock:
            self._made[key] = made
            if len(self._made) > self._keep:
                self._made.popitem(last=False)
        return made


class JsonWriter:
    """`state` is what was written so far; `after` tries a token, `commit` writes it."""

    def __init__(self, grammar: Grammar) -> None:
        self._vocabulary = grammar.vocabulary
        self._machine = Machine(grammar.root)
        self._matcher = grammar.matcher()
        self.state: State = self._machine.start
        self.begun = False  # whether anything is written
        self._ending_tokens: dict[State, int] = {}  # of states seen: within a string it is the same one

    def mask(self) -> Mask:
        """Tokens that go on with the text. All ordinary ones where llguidance gave up: `after` still judges."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return self._vocabulary.ordinary.copy()
        packed = self._vocabulary.ordinary_bits
        return np.unpackbits(bits[: len(packed)] & packed, count=self._vocabulary.size, bitorder="little").view(
            np.bool_
        )

    def allows(self, token: int) -> bool:
        """Whether a token may come: those that `mask` has, and other spellings of a text for which it has one."""
        return bool(self._vocabulary.texts[token]) and (
            self._matcher.is_error() or self._matcher.validate_tokens([token]) == 1
        )

    def after(self, token: int) -> State | None:
        """The state after a token, None if the text can't go on with it."""
        text = self._vocabulary.texts[token]
        return (self._machine.advance(self.state, text) or None) if text else None

    def commit(self, token: int, state: State) -> None:
        self.state, self.begun = state, True
        if not self._matcher.is_error():
            self._matcher.consume_token(token)

    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._machine.accepts(self.state)

    def continues(self) -> bool:
        return self._machine.continues(self.state)

    def ending_fits(self, state: State, room: int) -> bool:
        """Whether the shortest end from a state takes at most `room` tokens."""
        if self._machine.bytes_left(state) <= room:
            return True
        if state not in self._ending_tokens:
            self._ending_tokens[state] = len(self.ending(state))
        return self._ending_tokens[state] <= room

    def ending(self, state: State) -> list[int]:
        """Tokens of the shortest end."""
        return self._vocabulary.tokens_of(self._machine.shortest(state))
