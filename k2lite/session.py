"""Text above the engine: a prompt becomes an answer, piece by piece, and what two prompts share is computed once.

Invariant: the answer is the same whether a prefix was reused or not. Knows no terminal and no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from .engine import Engine, Sequence
from .sampling import SamplingParams, Token
from .text.stream import TextStream

FinishReason = Literal["stop", "length", "interrupted"]


class Answer:
    """Iterate to get the text as it comes. Afterwards `finish_reason` says why it ended; closing the iterator early
    leaves "interrupted"."""

    def __init__(self, tokens: Iterator[Token], text: TextStream) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason = "interrupted"
        self._tokens = tokens
        self._stream = text

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            self.ids.append(int(token))
            if token.is_stop:
                self.finish_reason = "stop"
                break
            yield from self._emit(self._stream.feed(int(token)))
            if self._stream.stopped:
                self.finish_reason = "stop"
                return
        else:
            self.finish_reason = "length"
        yield from self._emit(self._stream.flush())

    def _emit(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece


class Session:
    """One conversation's state: the tokens that are in the cache already."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sequence: Sequence | None = None

    def answer(
        self, ids: list[int], params: SamplingParams, *, max_tokens: int | None = None, stop: tuple[str, ...] = ()
    ) -> Answer:
        """Go on from the prompt `ids` (the whole conversation, not the news). Raises before any work is done."""
        wanted = self.engine.check_request(len(ids), max_tokens)
        self.engine.check_ids(ids)
        sequence = self._reuse(ids)
        rest = ids[len(sequence.ids) :]
        tokens = self.engine.continue_sequence(sequence, rest, wanted, params, self.engine.stop_ids)
        return Answer(tokens, TextStream(self.engine.tokenizer, stop=stop))

    def _reuse(self, ids: list[int]) -> Sequence:
        """The open sequence, cut back to what it shares with `ids`. One token always stays to be computed, since its
        logits begin the answer."""
        if self._sequence is None:
            self._sequence = self.engine.open()
        shared = 0
        for old, new in zip(self._sequence.ids, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        if shared < len(self._sequence.ids) / 2:  # what the template writes is always shared
            self.engine.new_conversation()
        self._sequence.truncate(shared)
        return self._sequence
