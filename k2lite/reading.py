"""Has an engine read a text window by window, for what its recorder sees.

Each window starts from an empty context. Control tokens in the text count as such: a text to record on may be rendered
dialogues.
"""

from __future__ import annotations

from k2lite.quant.errors import RequestError

from .engine import Engine
from .evaluation import split_windows
from .progress import ProgressLine


def read_windows(engine: Engine, text: str, window: int, max_tokens: int | None = None) -> int:
    """Returns the number of tokens read. Raises RequestError for a window or a limit below 2 tokens."""
    if max_tokens is not None and max_tokens < 2:
        raise RequestError(f"{max_tokens} tokens asked for; expected 2 or more")
    windows = split_windows(engine.tokenizer.encode(text, allow_special=True)[:max_tokens], window)
    line = ProgressLine(len(windows))
    try:
        for done, ids in enumerate(windows, 1):
            engine.logits(ids)
            line.update(done, f"window {done} of {len(windows)}")
    finally:
        line.close()
    return sum(map(len, windows))
