"""Typed reading of one JSON object of settings, with errors that name file, key, value found and values supported.

Remembers which keys were asked for, so that the rest can be listed as unknown. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from k2lite.quant.errors import ConfigError
from k2lite.quant.file_reading import is_file, is_name, read_json_object, shown

Value = TypeVar("Value")
_MISSING: Any = object()


class KeyReader:
    """Reads keys of `raw`. `where` is the dotted path inside the file, for messages."""

    def __init__(self, path: Path, raw: Mapping[str, Any], where: str = "") -> None:
        self.path = path
        self._raw = raw
        self._where = where
        self._read: set[str] = set()
        self._sections: dict[str, KeyReader] = {}

    def section(self, key: str) -> KeyReader:
        """The reader of an object inside this one; required. One reader a section, so that it knows all that was
        read of it."""
        value = self.mapping(key)
        if value is None:
            raise self._error(key, "is missing", "expected an object")
        return self._sections.setdefault(key, KeyReader(self.path, value, f"{self._name(key)}."))

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self._get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self._error(key, f"is {shown(value)}", "expected an object")
        return value

    def integer(self, key: str, *, default: int = _MISSING, at_least: int = 1, at_most: int = 1 << 40) -> int:
        value = self._required(key, default)
        # bool is an int in Python, and never a size
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
            bounds = f"from {at_least} to {at_most}" if at_most < 1 << 40 else f"of {at_least} or more"
            raise self._error(key, f"is {shown(value)}", f"supported: an integer {bounds}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self._get(key, None) is None else self.integer(key, at_least=0)

    def integers(self, key: str) -> tuple[int, ...]:
        """Absent, one integer, or a list of them."""
        value = self._get(key, None)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
            raise self._error(key, f"is {shown(value)}", "supported: an integer of 0 or more, or a list of them")
        return tuple(items)

    def number(self, key: str, *, default: float = _MISSING, positive: bool = True) -> float:
        value = self._required(key, default)
        if not _is_number(value) or (positive and not value > 0):
            raise self._error(
                key, f"is {shown(value)}", "supported: a number" + (" greater than 0" if positive else "")
            )
        return float(value)

    def boolean(self, key: str, *, default: bool = _MISSING) -> bool:
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise self._error(key, f"is {shown(value)}", "supported: true, false")
        return value

    def choice(self, key: str, supported: tuple[Value, ...], *, default: Value = _MISSING) -> Value:
        value = self._required(key, default)
        for candidate in supported:
            if type(value) is type(candidate) and value == candidate:
                return candidate
        raise self._error(key, f"is {shown(value)}", f"supported: {', '.join(map(repr, supported))}")

    def exactly(self, key: str, value: int, *, why: str) -> None:
        found = self._get(key, value)
        if type(found) is not int or found != value:
            raise self._error(key, f"is {shown(found)}", f"supported: {value}, since {why}")

    def absent(self, *keys: str) -> None:
        """Keys that name a mechanism this code does not have; null and false mean the mechanism is off."""
        for key in keys:
            if self._get(key, None) not in (None, False):
                raise self._error(key, f"is {shown(self._raw[key])}", "supported: absent or null")

    def known(self, *keys: str) -> None:
        """Mark keys as known and without effect here."""
        self._read.update(keys)

    def unread(self) -> tuple[str, ...]:
        """Names of keys that nobody asked for, here and in the sections that were opened."""
        here = [self._name(key if is_name(key) else shown(key)) for key in self._raw if key not in self._read]
        return (*here, *(name for section in self._sections.values() for name in section.unread()))

    def given(self, keys: Iterable[str]) -> bool:
        return any(self._raw.get(key) is not None for key in keys)

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        return self._raw.get(key, default)

    def _required(self, key: str, default: Any) -> Any:
        value = self._get(key, default)
        if value is _MISSING:
            raise self._error(key, "is missing", "it has no default")
        return value

    def _name(self, key: str) -> str:
        return f"{self._where}{key}"

    def _error(self, key: str, found: str, supported: str) -> ConfigError:
        return ConfigError(f"{self.path}: {self._name(key)} {found}; {supported}")


def _is_number(value: object) -> bool:
    """A finite number, as float64 holds it; JSON's true is none, and Python reads integers of any size."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file, or ConfigError."""
    if not is_file(path):
        raise ConfigError(f"{path}: not found; a model folder holds config.json beside its weights")
    return read_json_object(path, ConfigError)
