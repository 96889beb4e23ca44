"""Judging a tool call: the right name, arguments that satisfy the schema.

Only the part of JSON schema that the generator uses: an object with required properties of type string, integer or
boolean, and enumerations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def is_valid(name: str, arguments: str, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the tool exists and the arguments are JSON that satisfies its schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    try:
        value = json.loads(arguments)
    except ValueError:
        return False
    if name not in schemas or not isinstance(value, dict):
        return False
    properties = schemas[name]["properties"]
    complete = set(schemas[name]["required"]) <= set(value) <= set(properties)
    return complete and all(_satisfies(value[key], properties[key]) for key in value)


def _satisfies(value: Any, schema: Mapping[str, Any]) -> bool:
    kinds: dict[str, type] = {"string": str, "integer": int, "boolean": bool}
    right_type = type(value) is kinds[schema["type"]]
    return right_type and ("enum" not in schema or value in schema["enum"])
