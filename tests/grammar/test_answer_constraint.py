"""Whole answers written by chance: whatever a model wants, calls are declared, complete and valid within max_tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.grammar.answer_constraint import AnswerConstraint, Rules
from k2lite.grammar.json_writer import Grammar, Grammars
from k2lite.grammar.vocabulary import Vocabulary
from k2lite.sampling import SamplingParams, sample, sample_allowed
from k2lite.text.answer_reader import AnswerReader, CallArguments, CallBegin, ControlIds, Text
from k2lite.text.tokenizer import Tokenizer
from tests.grammar.schemas import SCHEMAS, TREE, valid
from tests.grammar.test_json_schema import UNFILLABLE
from tests.samples import examples


class Written:
    """An answer by random logits under rules."""

    def __init__(
        self, tokenizer: Tokenizer, words: Vocabulary, rules: Rules, schemas: Any, extra: int, seed: int
    ) -> None:
        control = ControlIds(tokenizer)
        constraint = AnswerConstraint(words, control, rules, tokenizer.end_of_turn_ids, thinks=False)
        reader = AnswerReader(tokenizer, tools=schemas, first_call=rules.first_call)
        self.ids: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        limit = constraint.shortest() + extra
        events = []
        for made in range(limit):
            logits = torch.randn(words.size, generator=generator)
            self.ids.append(constraint.accept(self._next(words, constraint, logits, limit - made), limit - made))
            if self.ids[-1] in tokenizer.end_of_turn_ids:
                break
            events += reader.feed(self.ids[-1])
            if constraint.finished:
                break
        events += reader.flush()
        self.finished = constraint.finished
        self.text = "".join(event.text for event in events if isinstance(event, Text))
        self.begun = [event for event in events if isinstance(event, CallBegin)]
        self.arguments = [
            "".join(event.text for event in events if isinstance(event, CallArguments) and event.index == call.index)
            for call in self.begun
        ]

    def _next(self, words: Vocabulary, constraint: AnswerConstraint, logits: torch.Tensor, left: int) -> int:
        """As the server does it, or a single byte: a spelling that no tokenizer would choose. `forced` and `allows` say
        what the mask says, but where it has one token for what may be spelt in several ways."""
        forced = constraint.forced(left)
        bytes_first = [
            words.ids[bytes([byte])] for byte in sorted(range(32, 127), key=lambda byte: float(logits[byte]))
        ]
        params = SamplingParams(temperature=1, seed=len(self.ids))
        token = sample_allowed(
            logits, params, left, lambda token: constraint.allows(token, left), lambda: constraint.mask(left)
        )
        allowed = {byte for byte in bytes_first if forced is None and constraint.allows(byte, left)}
        mask = constraint.mask(left)
        if forced is not None:
            assert torch.nonzero(mask).ravel().tolist() == [forced]
            return forced
        if constraint.forced(left) is None:
            masked = {byte for byte in bytes_first if mask[byte]}
            assert masked <= allowed
            assert masked == allowed or mask.sum() == 1
        return next((byte for byte in bytes_first if byte in allowed and logits[0] > 0), token)

    def check(self, schemas: Mapping[str, Any], first: int) -> None:
        """Every call is declared, numbered in order, and satisfies its schema."""
        for call, arguments in zip(self.begun, self.arguments, strict=True):
            assert call.id == f"functions.{call.name}:{first + call.index}"
            assert valid(json.loads(arguments), schemas[call.name]), (arguments, schemas[call.name])


@settings(max_examples=examples(60), deadline=None)
@given(SCHEMAS, SCHEMAS, st.integers(0, 40), st.integers(0, 1 << 30))
def test_forced_calls_are_valid_within_any_limit(
    demo_tokenizer: Tokenizer, demo_words: Vocabulary, one: Any, other: Any, extra: int, seed: int
) -> None:
    schemas = {"get": one, "get.more-of_it": other}
    rules = Rules({name: Grammar(schema, demo_words) for name, schema in schemas.items()}, "must", first_call=12)
    written = Written(demo_tokenizer, demo_words, rules, schemas, extra, seed)
    assert written.finished
    assert written.begun
    written.check(schemas, 12)


def test_every_schema_of_the_validator_is_filled(
    demo_tokenizer: Tokenizer, demo_words: Vocabulary, walle: list[dict[str, Any]]
) -> None:
    grammars = Grammars(demo_words)
    for place, schema in enumerate(walle):
        if schema == UNFILLABLE:
            continue
        rules = Rules({"f": grammars.of(schema)}, "must", max_calls=1)
        written = Written(demo_tokenizer, demo_words, rules, {"f": schema}, place % 8, place)
        assert written.finished
        assert len(written.begun) == 1
        written.check({"f": schema}, 0)


@settings(max_examples=examples(40), deadline=None)
@given(SCHEMAS, st.integers(1, 60), st.integers(0, 1 << 30))
def test_free_text_may_turn_into_calls_and_never_into_halves(
    byte_tokenizer: Tokenizer, bytes_only: Vocabulary, schema: Any, extra: int, seed: int
) -> None:
    rules = Rules({"f": Grammar(schema, bytes_only)}, "may")
    written = Written(byte_tokenizer, bytes_only, rules, {"f": schema}, extra, seed)
    written.check({"f": schema}, 0)
    opened = ControlIds(byte_tokenizer).section_begin in written.ids
    assert opened == bool(written.begun) == written.finished


@settings(max_examples=examples(40), deadline=None)
@given(SCHEMAS, st.integers(0, 30), st.integers(0, 1 << 30))
def test_a_whole_answer_satisfies_its_schema(
    demo_tokenizer: Tokenizer, demo_words: Vocabulary, schema: Any, extra: int, seed: int
) -> None:
    rules = Rules({}, text=Grammar(schema, demo_words))
    written = Written(demo_tokenizer, demo_words, rules, {}, extra, seed)
    assert valid(json.loads(written.text), schema), (written.text, schema)


def test_recursion_ends_in_time(demo_tokenizer: Tokenizer, demo_words: Vocabulary) -> None:
    rules = Rules({"f": Grammar(TREE, demo_words)}, "must")
    for seed in range(10):
        written = Written(demo_tokenizer, demo_words, rules, {"f": TREE}, 60, seed)
        assert written.finished
        written.check({"f": TREE}, 0)


@pytest.mark.parametrize("call", ["never", "may"])
def test_no_token_of_structure_without_a_call(byte_tokenizer: Tokenizer, bytes_only: Vocabulary, call: str) -> None:
    """Where no call fits or none may be made, its tokens can't be chosen."""
    tools = {"f": Grammar({"type": "string", "minLength": 50}, bytes_only)} if call == "may" else {}
    control = ControlIds(byte_tokenizer)
    constraint = AnswerConstraint(bytes_only, control, Rules(tools, call), byte_tokenizer.end_of_turn_ids, thinks=False)
    mask = constraint.mask(20)
    assert mask is not None
    allowed = {int(token) for token in torch.nonzero(mask).ravel()} & control.all
    assert allowed == set(byte_tokenizer.end_of_turn_ids)


@pytest.mark.parametrize("forced", ["call", "text"])
def test_a_thought_leaves_room_for_the_end(demo_tokenizer: Tokenizer, demo_words: Vocabulary, forced: str) -> None:
    """Two idle control tokens stand for those of a thought, and the model wants nothing else."""
    control = ControlIds(demo_tokenizer)
    begin, end = (demo_tokenizer.special_tokens[name] for name in ("[PAD]", "[UNK]"))
    control.think_begin, control.think_end = begin, end
    grammar = Grammar({"type": "integer"}, demo_words)
    rules = Rules({"f": grammar}, "must") if forced == "call" else Rules({}, text=grammar)
    thoughts = 0
    for extra in range(6):
        constraint = AnswerConstraint(
            demo_words, control, rules, demo_tokenizer.end_of_turn_ids, thinks=False, may_think=True
        )
        limit, ids = constraint.shortest() + extra, list[int]()
        for made in range(limit):
            wanted = torch.zeros(demo_words.size)
            wanted[begin], wanted[end] = 9.0, -9.0
            token = sample(wanted, SamplingParams(temperature=0), made, constraint.mask(limit - made))
            ids.append(constraint.accept(int(token), limit - made))
            if ids[-1] in demo_tokenizer.end_of_turn_ids or constraint.finished:
                break
        thoughts += begin in ids
        if forced == "call":
            assert ids[-1] == control.section_end, extra
        else:
            answer = ids[ids.index(end) + 1 :] if begin in ids else ids
            said = [token for token in answer if token not in demo_tokenizer.end_of_turn_ids]
            json.loads(demo_tokenizer.decode(said))
    assert thoughts
