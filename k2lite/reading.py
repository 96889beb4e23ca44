"""Has an engine read a text window by window, for what its recorder sees.

Each window starts from an empty context. Control tokens in the text count as such: a text to record on may be rendered
dialogues.
"""

from __future__ import annotations

from collections.abc import Sequence

from .engine import Engine
from .evaluation import split_windows
from .progress import ProgressLine
from .text.tokenizer import Tokenizer


def windows_of(tokenizer: Tokenizer, text: str, window: int, max_tokens: int) -> list[Sequence[int]]:
    """The ids that will be read, window by window. Raises RequestError for a text that has too few."""
    return split_windows(tokenizer.encode(text, allow_special=True)[:max_tokens], window)


def read_windows(engine: Engine, windows: Sequence[Sequence[int]]) -> None:
    """Read them, with a progress line."""
    line = ProgressLine(len(windows))
    try:
        for done, ids in enumerate(windows, 1):
            engine.logits(ids)
            line.update(done, f"window {done} of {len(windows)}")
    finally:
        line.close()
