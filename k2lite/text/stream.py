"""Token ids in, text out, piece by piece: whole characters only, and nothing of a stop string or after it.

Invariant: the pieces together are what `decode` gives for all ids, cut before the stop string that was completed
first. Knows no engine.
"""

from __future__ import annotations

import codecs

from .tokenizer import Tokenizer


class TextStream:
    """`stopped` is the stop string that ended the text, None before that."""

    def __init__(self, tokenizer: Tokenizer, *, stop: tuple[str, ...] = (), skip_special: bool = True) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._hidden = tokenizer.hidden_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that has become certain with this token, perhaps none."""
        if self.stopped is not None or token in self._hidden:
            return ""
        return self._release(self._utf8.decode(self._tokenizer.token_bytes(token)), final=False)

    def flush(self) -> str:
        """What is left at the end; half a character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        return self._release(self._utf8.decode(b"", final=True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            _, begin, self.stopped = min(found)
            self._held = ""
            return text[:begin]
        keep = 0 if final else self._could_begin_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _could_begin_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next(
            (size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in self._stop)), 0
        )
