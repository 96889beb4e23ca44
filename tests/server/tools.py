"""A tool the demo model knows how to use, and the conversation in which it does."""

from __future__ import annotations

from typing import Any

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["city", "count"],
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "send_letter", "description": "Send a letter.", "parameters": SCHEMA},
}
CLAUDE_TOOL: dict[str, Any] = {"name": "send_letter", "description": "Send a letter.", "input_schema": SCHEMA}
QUESTION = [{"role": "user", "content": "Please send a letter with city Torino and count 3."}]
ARGUMENTS = {"city": "Torino", "count": 3}
UNITS = [{"role": "user", "content": "How many centimeters are 12 meters?"}]
