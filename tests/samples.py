"""How many examples a property test takes: its own count, or SOAK times as many with `pytest --soak` (make soak)."""

from __future__ import annotations

SOAK = 20
_factor = 1


def take_full_counts() -> None:
    """Called before any test module is imported."""
    global _factor
    _factor = SOAK


def examples(count: int) -> int:
    return count * _factor
