"""A JSON object of a request, read field by field: each wrong type or value is a 400 that names the field.

Fields nobody asks for are ignored, as clients expect. null counts as absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import invalid


def parse_object(body: bytes, *, max_depth: int) -> Fields:
    """The body as an object. Raises ApiError 400 for what is not JSON, not an object, or nested too deeply."""
    try:
        value = json.loads(body, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell half a character, UTF-8 can't
    except (ValueError, RecursionError) as error:
        raise invalid("the body is not valid JSON in UTF-8") from error
    if not isinstance(value, dict):
        raise invalid("the body is not a JSON object")
    if depth(value, max_depth) > max_depth:
        raise invalid(f"the body is nested more than {max_depth} levels deep")
    return Fields(value, "")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number


def depth(value: Any, limit: int) -> int:
    """Levels of nesting, counted no further than limit + 1."""
    level, layer = 0, [value]
    while layer and level <= limit:
        level += 1
        layer = [
            item
            for node in layer
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    return level


class Fields:
    """`where` is the path of the object, as errors name it."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def string(self, name: str, default: str | None = None) -> str | None:
        value: str | None = self._typed(name, str, "a string", default)
        return value

    def required_string(self, name: str) -> str:
        value = self.string(name)
        if value is None:
            raise invalid(f"{self.path(name)} is missing", self.path(name))
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        return bool(self._typed(name, bool, "true or false", default))

    def integer(self, name: str, *, at_least: int, at_most: int = (1 << 63) - 1) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
            span = f"{at_least} or more" if at_most == (1 << 63) - 1 else f"{at_least} to {at_most}"
            raise invalid(f"{self.path(name)} must be an integer, {span}", self.path(name))
        return value

    def number(self, name: str, *, at_least: float, at_most: float) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value <= at_most:
            raise invalid(f"{self.path(name)} must be a number from {at_least:g} to {at_most:g}", self.path(name))
        return float(value)

    def object(self, name: str) -> Fields | None:
        value = self._typed(name, dict, "an object", None)
        return None if value is None else Fields(value, self.path(name))

    def array(self, name: str) -> list[Any] | None:
        value: list[Any] | None = self._typed(name, list, "an array", None)
        return value

    def objects(self, name: str) -> list[Fields]:
        """An array of objects, empty if absent."""
        found = []
        for place, value in enumerate(self.array(name) or []):
            where = f"{self.path(name)}[{place}]"
            if not isinstance(value, dict):
                raise invalid(f"{where} must be an object", where)
            found.append(Fields(value, where))
        return found

    def strings(self, name: str) -> tuple[str, ...]:
        """A string or an array of strings, empty if absent."""
        value = self.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise invalid(f"{self.path(name)} must be a string or an array of strings", self.path(name))
        return tuple(value)

    def choice(self, name: str, options: tuple[str, ...], default: str) -> str:
        value = self.string(name, default) or default
        if value not in options:
            raise invalid(f"{self.path(name)} must be one of {', '.join(options)}", self.path(name))
        return value

    def _typed(self, name: str, kind: type, expected: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise invalid(f"{self.path(name)} must be {expected}", self.path(name))
        return value
