"""Tools as TypeScript declarations, the form in which Kimi-K2.5 and later were taught them.

Written from a description of Moonshot's rules and one golden text. A schema outside those rules gives None, and the
template then declares the tools as JSON, as Moonshot's wrapper does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_NAMES = {"integer": "number", "number": "number", "string": "string", "boolean": "boolean", "null": "null"}
_REFERENCE = "#/$defs/"
INDENT = "  "


class _Unsupported(Exception):
    """A schema that the rules don't cover."""


def tools_as_typescript(tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The declaration of all tools of type "function", or None if one can't be expressed."""
    try:
        functions = [_function(tool["function"]) for tool in tools if tool.get("type") == "function"]
    except (_Unsupported, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return "\n".join(["# Tools", "", "## functions", "namespace functions {", *functions, "}", ""])


def _function(function: Mapping[str, Any]) -> str:
    root: Schema = function.get("parameters") or {}
    _check_references(root, {"#", *(_REFERENCE + name for name in root.get("$defs", {}))})
    lines = [
        f"interface {name} {_type(schema, 0)}"
        for name, schema in [*root.get("$defs", {}).items(), *_self_reference(root)]
    ]
    lines += _comment(function.get("description", ""), 0)
    parameters = "parameters" if _self_reference(root) else _object(root, 0)
    return "\n".join([*lines, f"type {function['name']} = (_: {parameters}) => any;"])


def _self_reference(root: Schema) -> list[tuple[str, Schema]]:
    """A schema that refers to itself ("#") is declared as an interface called parameters."""
    return [("parameters", {**root, "type": "object"})] if _refers_to_root(root) else []


def _refers_to_root(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("$ref") == "#" or any(map(_refers_to_root, value.values()))
    return isinstance(value, list) and any(map(_refers_to_root, value))


def _check_references(value: Any, known: set[str]) -> None:
    if isinstance(value, Mapping):
        target = value.get("$ref")
        if isinstance(target, str) and target not in known:
            raise _Unsupported(f"a reference to {target!r}")
        for item in value.values():
            _check_references(item, known)
    elif isinstance(value, list):
        for item in value:
            _check_references(item, known)


def _type(schema: Any, level: int) -> str:
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if not schema:
        return "any"
    if "$ref" in schema:
        return _reference(schema["$ref"])
    if "anyOf" in schema:
        return " | ".join(_type(option, level) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join({"object": "{}", "array": "Array<any>"}.get(name) or _NAMES[name] for name in kind)
    if kind == "object":
        return _object(schema, level)
    if kind == "array":
        return _array(schema, level)
    if kind in _NAMES:
        return _NAMES[kind]
    raise _Unsupported(f"a schema of type {kind!r}")


def _reference(target: str) -> str:
    return "parameters" if target == "#" else target.removeprefix(_REFERENCE)


def _object(schema: Schema, level: int) -> str:
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = set(schema.get("required") or ())
    members = [
        "\n".join([*_property_comments(properties[name], level + 1), f"{INDENT * (level + 1)}{name}{mark}: {kind}"])
        for name in sorted(properties, key=lambda name: (name not in required, name))
        for mark, kind in [("" if name in required else "?", _type(properties[name], level + 1))]
    ]
    if "additionalProperties" in schema:
        extra = schema["additionalProperties"]
        kind = {True: "any", False: "never"}[extra] if isinstance(extra, bool) else _type(extra, level + 1)
        members.append(f"{INDENT * (level + 1)}[k: string]: {kind}")
    return "{\n" + ",\n".join(members) + f"\n{INDENT * level}}}" if members else "{}"


def _array(schema: Schema, level: int) -> str:
    items = schema.get("items", True)
    comments = _property_comments(items, level + 1)
    if not comments:
        return f"Array<{_type(items, level)}>"
    inner = f"{INDENT * (level + 1)}{_type(items, level + 1)}"
    return "\n".join(["Array<", *comments, inner, f"{INDENT * level}>"])


def _property_comments(schema: Any, level: int) -> list[str]:
    """The lines above a property: its description, its constraints in one line, its default."""
    if not isinstance(schema, Mapping):
        return []
    lines = list(_comment(schema.get("description", ""), level))
    kind = schema.get("type")
    names = _CONSTRAINTS.get(kind, ()) if isinstance(kind, str) else ()
    constraints = [f"{name}: {schema[name]}" for name in names if name in schema]
    if constraints:
        lines.append(f"{INDENT * level}// {', '.join(constraints)}")
    if "default" in schema:
        value = schema["default"]
        # numbers and booleans appear as Python writes them
        shown = repr(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{INDENT * level}// Default: {shown}")
    return lines


def _comment(text: str, level: int) -> Iterator[str]:
    """`text` as comment lines; empty lines stay empty, and no text gives no line."""
    for line in text.split("\n") if text else ():
        yield f"{INDENT * level}// {line}" if line else ""
