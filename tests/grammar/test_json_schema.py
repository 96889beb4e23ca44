"""Grammars of schemas: every text satisfies its schema, two implementations agree on every byte, ends are shortest."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from llguidance import LLMatcher

from k2lite.grammar.json_schema import compile_schema
from k2lite.grammar.json_writer import Grammar, JsonWriter
from k2lite.grammar.machine import Machine
from k2lite.grammar.nodes import Node, to_lark
from k2lite.grammar.schema_judging import UnsupportedSchema
from k2lite.grammar.vocabulary import Vocabulary
from tests.grammar.schemas import SCHEMAS, TREE, valid
from tests.samples import examples

UNFILLABLE = {"minLength": 999999999999, "type": "string"}


def random_text(node: Node, seed: int, steps: int) -> bytes:
    """`steps` random bytes of the grammar, then its shortest end."""
    rng, machine = random.Random(seed), Machine(node)
    state, text = machine.start, b""
    for _ in range(steps):
        options = [byte for byte in range(256) if machine.advance(state, bytes([byte]))]
        if not options:
            break
        text += bytes([rng.choice(options)])
        state = machine.advance(machine.start, text)
    return text + machine.shortest(state)


@settings(max_examples=examples(60), deadline=None)
@given(SCHEMAS, st.integers(0, 1 << 30), st.integers(0, 40))
def test_every_text_satisfies_its_schema(schema: Any, seed: int, steps: int) -> None:
    text = random_text(compile_schema(schema), seed, steps)
    assert valid(json.loads(text), schema), (text, schema)


def test_every_schema_of_the_validator_has_a_grammar(walle: list[dict[str, Any]]) -> None:
    for place, schema in enumerate(walle):
        if schema == UNFILLABLE:
            with pytest.raises(UnsupportedSchema, match="minLength"):
                compile_schema(schema)
        else:
            text = random_text(compile_schema(schema), place, 12)
            assert valid(json.loads(text), schema), (text, schema)


@settings(max_examples=examples(25), deadline=None)
@given(SCHEMAS, st.integers(0, 1 << 30))
def test_llguidance_allows_the_same_bytes(bytes_only: Vocabulary, schema: Any, seed: int) -> None:
    """An independent engine on the same grammar: masks and ends agree after every byte of a random text."""
    node = compile_schema(schema)
    text = random_text(node, seed, 15)
    matcher = LLMatcher(bytes_only.llguidance, LLMatcher.grammar_from_lark(to_lark(node)))
    assert not matcher.is_error(), matcher.get_error()
    machine = Machine(node)
    state = machine.start
    for byte in text:
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:256]
        assert set(np.flatnonzero(mask)) == {at for at in range(256) if machine.advance(state, bytes([at]))}
        assert matcher.is_accepting() == machine.accepts(state)
        assert matcher.consume_token(byte)
        state = machine.advance(state, bytes([byte]))
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "shortest"),
    [
        (TREE, '{"value":0,"children":[]}'),
        ({"anyOf": [{"type": "string", "minLength": 3}, {"type": "null"}]}, "null"),
        ({"type": "string", "minLength": 2}, None),
        ({"type": "array", "items": {"type": "integer", "minimum": 10}, "minItems": 2}, "[10,10]"),
        ({"type": "number", "minimum": 0.25, "maximum": 0.75}, None),
        ({"type": "integer", "minimum": -5, "maximum": -3}, "-3"),
        ({"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": {"const": 1}}}]}, '{"a":1}'),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, None),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"enum": ["long", "ab"]}}}, '"ab"'),
    ],
)
def test_the_shortest_text_is_known(schema: Any, shortest: str | None) -> None:
    found = compile_schema(schema).shortest
    assert found is not None
    assert valid(json.loads(found), schema)
    assert shortest is None or len(found) == len(shortest)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "bounds"),
        ({"$ref": "#/nowhere"}, "leads nowhere"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no value"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "thing"}, "type"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ([], "a schema is"),
        ({"enum": ["a", "b"], "pattern": "^a$"}, "pattern"),
        ({"enum": [1, 5], "exclusiveMinimum": 5}, "no value"),
        (
            {
                "type": "object",
                "allOf": [
                    {"properties": {"a": {"type": "null"}}, "additionalProperties": False},
                    {"properties": {"b": {"type": "null"}}},
                ],
            },
            "additionalProperties",
        ),
    ],
)
def test_what_can_not_be_kept_is_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(UnsupportedSchema, match=named):
        compile_schema(schema)


def test_what_only_looks_satisfied_is_not_written() -> None:
    machine = Machine(compile_schema({"enum": [1, 5], "exclusiveMinimum": 3}))
    assert not machine.advance(machine.start, b"1")
    assert machine.advance(machine.start, b"5")
    machine = Machine(compile_schema({"type": "string", "pattern": "^[^é]$"}))
    assert not machine.advance(machine.start, '"é'.encode())
    assert machine.advance(machine.start, b'"e')


def test_a_declared_name_is_no_additional_property() -> None:
    schema = {"type": "object", "properties": {"ab": {"type": "null"}}, "additionalProperties": {"type": "integer"}}
    machine = Machine(compile_schema(schema))
    assert not machine.advance(machine.start, b'{"ab":1')
    assert not machine.advance(machine.start, b'{"\\u0061b":1')
    for text in (b'{"a":1', b'{"abc":1', b'{"ab":null, "x":1', b'{"":1'):
        assert machine.advance(machine.start, text), text


def test_half_a_character_is_completed(demo_words: Vocabulary) -> None:
    writer = JsonWriter(Grammar({"type": "string"}, demo_words))
    state = writer.state
    for byte in '"é'.encode()[:-1]:
        token = demo_words.ids[bytes([byte])]
        after = writer.after(token)
        assert after is not None
        writer.commit(token, after)
        state = after
    ending = b"".join(demo_words.texts[token] for token in writer.ending(state))
    assert json.loads(b'"\xc3' + ending)
