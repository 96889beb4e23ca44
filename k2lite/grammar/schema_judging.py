"""What can be told of JSON schemas by looking at them: implied types, branches that exclude one another, listed values.

Never guesses: what it can't judge is UnsupportedSchema. Knows no grammar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2lite.quant.errors import RequestError


class UnsupportedSchema(RequestError):
    """A schema that is malformed, that no value satisfies, or that a grammar can't keep; names the place."""


def implied(schema: Mapping[str, Any]) -> list[str]:
    """The type of a schema that names none: what its keywords are about, else anything."""
    if schema.keys() & {"properties", "required", "additionalProperties"}:
        return ["object"]
    if schema.keys() & {"items", "minItems", "maxItems"}:
        return ["array"]
    if schema.keys() & {"minLength", "maxLength", "pattern"}:
        return ["string"]
    if schema.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}:
        return ["number"]
    return ["object", "array", "string", "number", "boolean", "null"]


def disjoint(branches: list[Any]) -> bool:
    """Whether no value can satisfy two branches, by their types or by a required property with different constants."""
    kinds = [branch.get("type") if isinstance(branch, Mapping) else None for branch in branches]
    names = [{"number"} if kind == "integer" else {kind} for kind in kinds if isinstance(kind, str)]
    if len(names) == len(branches) and len(set().union(*names)) == len(branches):
        return True
    constants = [_tags(branch) for branch in branches]
    return any(
        len({repr(tags.get(name)) for tags in constants}) == len(branches)
        for name in set.intersection(*(set(tags) for tags in constants))
    )


def _tags(branch: Any) -> dict[str, Any]:
    if not isinstance(branch, Mapping):
        return {}
    if "const" in branch:
        return {"": branch["const"]}
    properties, required = branch.get("properties") or {}, branch.get("required") or []
    found = {}
    for name, sub in properties.items():
        values = (
            [sub["const"]]
            if isinstance(sub, Mapping) and "const" in sub
            else (sub.get("enum") if isinstance(sub, Mapping) else None)
        )
        if name in required and isinstance(values, list) and len(values) == 1:
            found[name] = values[0]
    return found


def demand_both_open(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Refuse to join schemas of which one says what properties may be that only the other declares."""
    for closed, declaring in ((one, other), (other, one)):
        names = (declaring.get("properties") or {}).keys() - (closed.get("properties") or {}).keys()
        if closed.get("additionalProperties", True) is not True and names:
            raise UnsupportedSchema(
                f"{at(where)}: additionalProperties beside another subschema's property {min(names)} is not supported"
            )


def plainly_satisfies(value: Any, rest: Mapping[str, Any], where: str) -> bool:
    """Whether a listed value satisfies the other keywords; only simple ones are known here."""
    for key, wanted in rest.items():
        if key == "type":
            kinds = [wanted] if isinstance(wanted, str) else wanted
            if not any(is_of(value, kind) for kind in kinds):
                return False
        elif key in ("minLength", "maxLength") and isinstance(value, str):
            if (len(value) < wanted) if key == "minLength" else (len(value) > wanted):
                return False
        elif key in ("minimum", "maximum") and is_of(value, "number"):
            if (value < wanted) if key == "minimum" else (value > wanted):
                return False
        elif key in ("exclusiveMinimum", "exclusiveMaximum") and is_of(value, "number"):
            if (value <= wanted) if key == "exclusiveMinimum" else (value >= wanted):
                return False
        elif key == "pattern" and isinstance(value, str):
            raise UnsupportedSchema(f"{at(where)}: enum together with pattern is not supported")
        elif isinstance(value, dict | list):
            raise UnsupportedSchema(f"{at(where)}: enum of objects or arrays together with {key} is not supported")
    return True


def is_of(value: Any, kind: str) -> bool:
    if kind == "integer":
        return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    kinds: dict[str, Any] = {"null": type(None), "boolean": bool, "object": dict, "array": list, "string": str}
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kinds[kind]) if kind in kinds else False


def at(where: str) -> str:
    return where or "the schema"
