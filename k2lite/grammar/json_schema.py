"""A JSON schema as a grammar whose every text satisfies it.

Narrower than the schema in places, never wider: properties come in the order in which they are declared, undeclared
ones only where additionalProperties asks for them. A keyword that a grammar can't keep is refused by name; annotations
and unknown keywords are passed over, as JSON Schema says (`format` is an annotation).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from k2lite.quant.errors import RequestError

from .nodes import EMPTY, Alt, Lexeme, Literal, Node, Ref, Repeat, Seq, settle
from .numbers import integers, numbers
from .patterns import pattern_string
from .schema_judging import UnsupportedSchema, at, demand_both_open, disjoint, implied, plainly_satisfies
from .strings import key_except, string

TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
# assertions that no grammar here keeps; those that may be harmless have a test of their own
_REFUSED = (
    *("not", "if", "then", "else", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas"),
    *("dependencies", "contains", "minContains", "maxContains", "unevaluatedProperties", "unevaluatedItems"),
    *("prefixItems", "additionalItems", "multipleOf", "minProperties", "maxProperties", "$dynamicRef"),
)
_HARMLESS: dict[str, Any] = {"minProperties": 0, "minContains": 0, "unevaluatedProperties": True, "propertyNames": True}
_ASSERTING = (
    *("type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "oneOf", "allOf"),
    *("$ref", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems"),
    *("maxItems", "uniqueItems", "pattern", *_REFUSED),
)
_COMMA = Lexeme(Seq(Literal(b","), Repeat(Literal(b" "), 0, 1)))
_COLON = Lexeme(Seq(Literal(b":"), Repeat(Literal(b" "), 0, 1)))
MAX_NODES = 100_000


def compile_schema(schema: Any) -> Node:
    """The grammar of all texts that satisfy `schema` (some are left out). Raises UnsupportedSchema."""
    compiler = _Compiler(schema)
    try:
        root = compiler.node(schema, "")
    except RecursionError:
        raise UnsupportedSchema("the schema is nested too deeply") from None
    settle(root)
    if root.shortest is None:
        raise UnsupportedSchema("no value satisfies the schema")
    return root


class _Compiler:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._refs: dict[str, Ref] = {}
        self._any: Ref | None = None
        self._made = 0

    def node(self, schema: Any, where: str) -> Node:
        self._made += 1
        if self._made > MAX_NODES:
            raise UnsupportedSchema("the schema is too large once its references are followed")
        if schema is True or schema == {}:
            return self._anything()
        if schema is False:
            raise UnsupportedSchema(f"{at(where)}: nothing satisfies the schema false")
        if not isinstance(schema, Mapping):
            raise UnsupportedSchema(f"{at(where)}: a schema is an object or a boolean")
        self._refuse(schema, where)
        if "$ref" in schema:
            return self._reference(schema, where)
        if "allOf" in schema:
            return self.node(self._merged(_without(schema, "allOf"), _schemas(schema, "allOf", where), where), where)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._choice(schema, word, where)
        if "const" in schema or "enum" in schema:
            return self._values(schema, where)
        return self._typed(schema, where)

    def _refuse(self, schema: Mapping[str, Any], where: str) -> None:
        for word in _REFUSED:
            if word in schema and not (word in _HARMLESS and schema[word] == _HARMLESS[word]):
                if word == "multipleOf" and schema[word] == 1:
                    continue
                raise UnsupportedSchema(f"{at(where)}: the keyword {word} is not supported in constrained decoding")
        if schema.get("uniqueItems") and _size(schema, "maxItems", where, None) not in (0, 1):
            raise UnsupportedSchema(f"{at(where)}: the keyword uniqueItems is not supported in constrained decoding")

    def _reference(self, schema: Mapping[str, Any], where: str) -> Node:
        name = schema["$ref"]
        target = self._pointed(name, where)
        rest = {key: value for key, value in schema.items() if key != "$ref" and key in _ASSERTING}
        if rest:
            return self.node(self._merged(rest, [target], where), where)
        if name not in self._refs:
            ref = self._refs[name] = Ref()
            ref.target = self.node(target, where)
        return self._refs[name]

    def _pointed(self, name: Any, where: str) -> Any:
        if not isinstance(name, str) or not name.startswith("#"):
            raise UnsupportedSchema(f"{at(where)}: $ref must begin with #; other documents are not read")
        value = self._root
        for step in name[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            elif isinstance(value, Mapping) and step in value:
                value = value[step]
            else:
                raise UnsupportedSchema(f"{at(where)}: $ref {name} leads nowhere")
        return value

    def _merged(self, base: Mapping[str, Any], more: list[Any], where: str) -> dict[str, Any]:
        """One schema that asserts all of these. What can't be put together is refused."""
        result = dict(base)
        for schema in more:
            if schema is True:
                continue
            if isinstance(schema, Mapping) and "$ref" in schema:
                schema = {**self._merged({}, [self._pointed(schema["$ref"], where)], where), **_without(schema, "$ref")}
            if not isinstance(schema, Mapping):
                raise UnsupportedSchema(f"{at(where)}: these schemas can't be combined")
            demand_both_open(result, schema, where)
            for key, value in schema.items():
                if key == "properties" and isinstance(result.get(key), Mapping) and isinstance(value, Mapping):
                    both = result[key].keys() & value.keys()
                    if any(result[key][name] != value[name] for name in both):
                        raise UnsupportedSchema(f"{at(where)}: a property is declared twice, in different ways")
                    result[key] = {**result[key], **value}
                elif key == "required" and isinstance(result.get(key), list) and isinstance(value, list):
                    result[key] = [*result[key], *(name for name in value if name not in result[key])]
                elif key not in result or key not in _ASSERTING:
                    result[key] = value
                elif result[key] != value:
                    raise UnsupportedSchema(f"{at(where)}: {key} is asserted twice, in different ways")
        return result

    def _choice(self, schema: Mapping[str, Any], word: str, where: str) -> Node:
        branches = _schemas(schema, word, where)
        base = {key: value for key, value in _without(schema, word).items() if key in _ASSERTING}
        if word == "oneOf" and not disjoint(branches):
            raise UnsupportedSchema(
                f"{at(where)}: oneOf is supported where the types or a constant tell the branches apart"
            )
        nodes = []
        problem: UnsupportedSchema | None = None
        for place, branch in enumerate(branches):
            try:
                merged = self._merged(base, [branch], where) if base else branch
                nodes.append(self.node(merged, f"{where}/{word}/{place}"))
            except UnsupportedSchema as error:  # a branch that nothing satisfies may be left out, as any may
                problem = error
        if not nodes:
            raise problem or UnsupportedSchema(f"{at(where)}: {word} is empty")
        return Alt(*nodes)

    def _values(self, schema: Mapping[str, Any], where: str) -> Node:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise UnsupportedSchema(f"{at(where)}: enum must be an array with values")
        rest = {key: value for key, value in schema.items() if key in _ASSERTING and key not in ("const", "enum")}
        if "const" in schema and "enum" in schema:
            values = [value for value in values if value in schema["enum"]]
        kept = [value for value in values if plainly_satisfies(value, rest, where)]
        if not kept:
            raise UnsupportedSchema(f"{at(where)}: no value of enum or const satisfies the rest of the schema")
        return Alt(*(Lexeme(Literal(_json(value))) for value in kept))

    def _typed(self, schema: Mapping[str, Any], where: str) -> Node:
        kinds = schema.get("type")
        if kinds is None:
            kinds = implied(schema)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or any(kind not in TYPES for kind in kinds):
            raise UnsupportedSchema(f"{at(where)}: type must be of {', '.join(TYPES)}")
        kinds = list(dict.fromkeys([*kinds, *(["null"] if schema.get("nullable") is True else [])]))
        nodes: list[Node] = []
        problem: UnsupportedSchema | None = None
        for kind in kinds:
            try:
                nodes.append(self._of_type(kind, schema, where))
            except UnsupportedSchema as error:
                problem = error
        if not nodes and problem:
            raise problem
        return nodes[0] if len(nodes) == 1 else Alt(*nodes)

    def _of_type(self, kind: str, schema: Mapping[str, Any], where: str) -> Node:
        if kind == "null":
            return Lexeme(Literal(b"null"))
        if kind == "boolean":
            return Alt(Lexeme(Literal(b"true")), Lexeme(Literal(b"false")))
        if kind == "string":
            low, high = _size(schema, "minLength", where, 0), _size(schema, "maxLength", where, None)
            _in_order(low, high, "minLength", where)
            if schema.get("pattern") is None:
                return string(low or 0, high)
            try:
                return pattern_string(str(schema["pattern"]), low or 0, high)
            except RequestError as error:
                raise UnsupportedSchema(f"{at(where)}: {error}") from error
        if kind in ("integer", "number"):
            return _number(schema, kind, where)
        return self._array(schema, where) if kind == "array" else self._object(schema, where)

    def _array(self, schema: Mapping[str, Any], where: str) -> Node:
        low, high = _size(schema, "minItems", where, 0) or 0, _size(schema, "maxItems", where, None)
        _in_order(low, high, "minItems", where)
        begin, end = Lexeme(Literal(b"[")), Lexeme(Literal(b"]"))
        if high == 0:
            return Seq(begin, end)
        if isinstance(schema.get("items"), list):
            raise UnsupportedSchema(f"{at(where)}: items must be one schema")
        item = self.node(schema.get("items", True), f"{where}/items")
        more = Repeat(Seq(_COMMA, item), max(low - 1, 0), None if high is None else high - 1)
        filled = Seq(begin, item, more, end)
        return filled if low else Alt(Seq(begin, end), filled)

    def _object(self, schema: Mapping[str, Any], where: str) -> Node:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise UnsupportedSchema(f"{at(where)}: properties must be an object and required an array")
        extra = schema.get("additionalProperties", True)
        declared = {**properties, **{name: extra for name in required if name not in properties}}
        # only what is asked for is offered beyond the declared properties
        open_ended = extra is not False and ("additionalProperties" in schema or not declared)
        key_end: Node = EMPTY
        if open_ended:
            value = self.node(extra, f"{where}/additionalProperties")
            pair = Seq(key_except(declared), _COLON, value)
            key_end = Repeat(Seq(_COMMA, pair), 0, None)
            first_end: Node = Alt(EMPTY, Seq(pair, key_end))
        else:
            first_end = EMPTY
        later: Node = key_end  # after a property
        first: Node = first_end  # at the beginning
        for name, sub in reversed(list(declared.items())):
            try:
                value = self.node(sub, f"{where}/properties/{name}")
            except UnsupportedSchema:
                if name in required:
                    raise
                continue  # an optional property may be left out for good
            pair = Seq(Lexeme(Literal(_json(name))), _COLON, value)
            now, then = Seq(pair, later), Seq(_COMMA, pair, later)
            first, later = (now, then) if name in required else (Alt(now, first), Alt(then, later))
        return Seq(Lexeme(Literal(b"{")), first, Lexeme(Literal(b"}")))

    def _anything(self) -> Node:
        if self._any is None:
            self._any = Ref()
            kinds = {"type": ["object", "array", "string", "number", "boolean", "null"]}
            self._any.target = self._typed(kinds, "")
        return self._any


def _number(schema: Mapping[str, Any], kind: str, where: str) -> Node:
    low, high = _bound(schema, "minimum", where), _bound(schema, "maximum", where)
    over, under = _bound(schema, "exclusiveMinimum", where), _bound(schema, "exclusiveMaximum", where)
    open_low, open_high = schema.get("exclusiveMinimum") is True, schema.get("exclusiveMaximum") is True
    if over is not None and (low is None or over >= low):
        low, open_low = over, True
    if under is not None and (high is None or under <= high):
        high, open_high = under, True
    if kind == "number" and "multipleOf" not in schema:
        node = numbers(low, high, open_low=open_low, open_high=open_high)
    else:
        first = None if low is None else int(low.to_integral_value("ROUND_CEILING")) + (open_low and low % 1 == 0)
        last = None if high is None else int(high.to_integral_value("ROUND_FLOOR")) - (open_high and high % 1 == 0)
        node = integers(first, last)
    if node is None:
        raise UnsupportedSchema(f"{at(where)}: no {kind} lies within the bounds")
    return node


def _bound(schema: Mapping[str, Any], word: str, where: str) -> Decimal | None:
    value = schema.get(word)
    if value is None or isinstance(value, bool):
        return None
    if not isinstance(value, int | float) or abs(value) > 1e30:
        raise UnsupportedSchema(f"{at(where)}: {word} must be a number of at most 1e30")
    return Decimal(repr(value) if isinstance(value, float) else value)


def _size(schema: Mapping[str, Any], word: str, where: str, default: int | None) -> int | None:
    value = schema.get(word, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not 0 <= value < 1 << 31:
        raise UnsupportedSchema(f"{at(where)}: {word} must be a whole number, 0 or more")
    return int(value)


def _in_order(low: int | None, high: int | None, word: str, where: str) -> None:
    if high is not None and (low or 0) > high:
        raise UnsupportedSchema(f"{at(where)}: {word} is greater than what is allowed at most")


def _schemas(schema: Mapping[str, Any], word: str, where: str) -> list[Any]:
    value = schema[word]
    if not isinstance(value, list) or not value:
        raise UnsupportedSchema(f"{at(where)}: {word} must be an array of schemas")
    return value


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _without(schema: Mapping[str, Any], word: str) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != word}
