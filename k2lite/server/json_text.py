"""JSON as every reply has it: one encoder, since making one takes as long as a token's event."""

from __future__ import annotations

import json
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False)


def to_json(value: Any) -> str:
    """One line of JSON, characters as they are."""
    return _ENCODER.encode(value)
