"""The TypeScript form of tools: the golden text, and each rule as literal text derived from the rules by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2lite.text.typescript_tools import tools_as_typescript


def one(parameters: Any, description: str | None = None) -> str | None:
    """The declaration of a single function f, without the frame around it."""
    function = {"name": "f", "parameters": parameters}
    text = tools_as_typescript(
        [{"type": "function", "function": function | ({"description": description} if description else {})}]
    )
    if text is None:
        return None
    head, tail = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(head)
    assert text.endswith(tail)
    return text[len(head) : -len(tail)]


def properties(required: list[str] | None = None, **schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schemas, **({"required": required} if required else {})}


def test_golden(shared: Path) -> None:
    golden = json.loads((shared / "data/derived/chat_render_golden.json").read_text(encoding="utf-8"))
    assert tools_as_typescript(golden["tools"]) == golden["tools_ts_str_sorted"]


RULES: dict[str, tuple[Any, str]] = {
    "no parameters": ({}, "type f = (_: {}) => any;"),
    "required first, each group by name": (
        properties(["z", "b"], a={"type": "string"}, z={"type": "integer"}, b={"type": "boolean"}, c={"type": "null"}),
        "type f = (_: {\n  b: boolean,\n  z: number,\n  a?: string,\n  c?: null\n}) => any;",
    ),
    "nested": (
        properties(None, a=properties(["b"], b={"type": "number"})),
        "type f = (_: {\n  a?: {\n    b: number\n  }\n}) => any;",
    ),
    "additional properties": (
        {**properties(None, a={"type": "string"}), "additionalProperties": False},
        "type f = (_: {\n  a?: string,\n  [k: string]: never\n}) => any;",
    ),
    "additional properties of a type": (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        "type f = (_: {\n  [k: string]: number\n}) => any;",
    ),
    "additional properties of any type": (
        {"type": "object", "additionalProperties": True},
        "type f = (_: {\n  [k: string]: any\n}) => any;",
    ),
    "description, constraints and default": (
        properties(
            None, a={"type": "string", "description": "One\n\nTwo", "minLength": 1, "maxLength": 9, "default": "x"}
        ),
        "type f = (_: {\n  // One\n\n  // Two\n  // maxLength: 9, minLength: 1\n"
        '  // Default: "x"\n  a?: string\n}) => any;',
    ),
    "numbers and booleans default as Python writes them": (
        properties(None, a={"type": "boolean", "default": True}, b={"type": "number", "default": 1.0, "minimum": 0}),
        "type f = (_: {\n  // Default: True\n  a?: boolean,\n"
        "  // minimum: 0\n  // Default: 1.0\n  b?: number\n}) => any;",
    ),
    "enum, with null": (
        properties(None, a={"enum": ["x", 1, None]}),
        'type f = (_: {\n  a?: "x" | 1 | None\n}) => any;',
    ),
    "list of types": (
        properties(None, a={"type": ["string", "object", "array", "null"]}),
        "type f = (_: {\n  a?: string | {} | Array<any> | null\n}) => any;",
    ),
    "anyOf": (
        properties(None, a={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}),
        "type f = (_: {\n  a?: string | Array<number>\n}) => any;",
    ),
    "boolean schemas and the empty one": (
        properties(None, a=True, b=False, c={}),
        "type f = (_: {\n  a?: any,\n  b?: null,\n  c?: any\n}) => any;",
    ),
    "array with item comments": (
        properties(None, a={"type": "array", "maxItems": 3, "items": {"type": "string", "description": "One"}}),
        "type f = (_: {\n  // maxItems: 3\n  a?: Array<\n    // One\n    string\n  >\n}) => any;",
    ),
    "definitions": (
        {**properties(None, a={"$ref": "#/$defs/X"}), "$defs": {"X": properties(["n"], n={"type": "integer"})}},
        "interface X {\n  n: number\n}\ntype f = (_: {\n  a?: X\n}) => any;",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    parameters, expected = RULES[rule]
    assert one(parameters) == expected


def test_description_stands_above_the_function() -> None:
    assert one({}, "Does this.\n\nAnd that.") == "// Does this.\n\n// And that.\ntype f = (_: {}) => any;"


def test_a_self_reference_becomes_an_interface() -> None:
    tree = properties(None, child={"$ref": "#"})
    assert one(tree) == "interface parameters {\n  child?: parameters\n}\ntype f = (_: parameters) => any;"


@pytest.mark.parametrize(
    "schema",
    [
        {"description": "no type"},
        {"type": "date"},
        {"$ref": "http://x"},
        {"$ref": "#/$defs/Absent"},
        {"type": ["date"]},
        {"anyOf": 3},
    ],
)
def test_what_the_rules_do_not_cover_falls_back_to_json(schema: Any) -> None:
    assert one(properties(None, a=schema)) is None


def test_tools_of_other_kinds_are_left_out() -> None:
    text = tools_as_typescript([{"type": "builtin", "name": "search"}, {"type": "function", "function": {"name": "g"}}])
    assert text is not None
    assert "search" not in text
    assert "type g = (_: {}) => any;" in text
