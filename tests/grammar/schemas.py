"""Random JSON schemas that some value satisfies, and jsonschema's judgement."""

from __future__ import annotations

from typing import Any

import jsonschema
from hypothesis import strategies as st

WORDS = st.text('abcé"\\ ü中', min_size=1, max_size=4)
SMALL = st.integers(-30, 30)


def valid(value: Any, schema: Any) -> bool:
    """Judged by jsonschema. An $id only names a schema, and jsonschema would look it up."""
    bare = {key: item for key, item in schema.items() if key != "$id"} if isinstance(schema, dict) else schema
    return bool(jsonschema.Draft202012Validator(bare).is_valid(value))


@st.composite
def _numbers(draw: st.DrawFn) -> dict[str, Any]:
    low, high = sorted((draw(SMALL), draw(SMALL)))
    schema: dict[str, Any] = {"type": draw(st.sampled_from(["integer", "number"]))}
    if draw(st.booleans()):
        schema["minimum"] = low
    if draw(st.booleans()):
        schema["maximum"] = high
    if draw(st.booleans()) and "minimum" not in schema:
        schema["exclusiveMinimum"] = low - 2
    return schema


@st.composite
def _strings(draw: st.DrawFn) -> dict[str, Any]:
    low = draw(st.integers(0, 4))
    schema: dict[str, Any] = {"type": "string", "minLength": low}
    if draw(st.booleans()):
        schema["maxLength"] = low + draw(st.integers(0, 4))
    return schema


PATTERNS = st.sampled_from(
    ["^[a-z]{2,4}$", "^\\d{4}-\\d{2}$", "^(red|green)?$", "x+y", "^[^a]{3}", "\\.(py|txt)$", '^"\\w+"$']
)
LEAVES = st.one_of(
    _numbers(),
    _strings(),
    st.just({"type": "boolean"}),
    st.just({"type": ["null", "integer"]}),
    st.just({}),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(WORDS, SMALL, st.none()), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, WORDS),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern}, PATTERNS),
)


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(WORDS, inner, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    extra = draw(st.one_of(st.none(), st.booleans(), inner))
    if extra is not None:
        schema["additionalProperties"] = extra
    return schema


@st.composite
def _arrays(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    low = draw(st.integers(0, 3))
    schema: dict[str, Any] = {"type": "array", "items": draw(inner), "minItems": low}
    if draw(st.booleans()):
        schema["maxItems"] = low + draw(st.integers(0, 2))
    return schema


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    choice = st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=3))
    return st.one_of(_objects(inner), _arrays(inner), choice)


SCHEMAS: st.SearchStrategy[Any] = st.recursive(LEAVES, _grown, max_leaves=8)
TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value", "children"],
}
