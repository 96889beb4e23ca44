"""OpenAI's older completions: a prompt goes on, without a template. Editors use it to complete code."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from k2lite.text.answer_reader import Text

from .answering import Finish, Piece
from .errors import ApiError, invalid
from .fields import Fields
from .openai_chat import error_body, sse, usage
from .service import Answer, Service

DEFAULT_MAX_TOKENS = 16  # the API's own


def read_prompt(fields: Fields, service: Service) -> list[int]:
    """Token ids of `prompt`: a text (control tokens in it are text), or ids. Raises ApiError."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        if not prompt:
            raise invalid("prompt is empty", "prompt")
        return service.engine.tokenizer.encode(prompt)
    vocab = service.engine.config.vocab_size
    if not isinstance(prompt, list) or not prompt:
        raise invalid("prompt must be a string or an array of token ids, one prompt a request", "prompt")
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab for token in prompt):
        raise invalid(f"prompt holds something that is no token id of this model (0 to {vocab - 1})", "prompt")
    return list(prompt)


class CompletionWriter:
    """The shapes of one answer."""

    def __init__(self, service: Service) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self, answer: Answer) -> dict[str, Any]:
        text, reason = "", "stop"
        async for news in answer:
            if isinstance(news, Finish):
                reason = news.reason
            elif isinstance(news, Piece):
                text += _said(news)
        return {**self._head, "choices": [_choice(text, reason)], "usage": usage(answer.usage)}

    async def stream(self, answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
        try:
            async for news in answer:
                if isinstance(news, Finish):
                    yield sse({**self._head, "choices": [_choice("", news.reason)]})
                elif isinstance(news, Piece) and (text := _said(news)):
                    yield sse({**self._head, "choices": [_choice(text, None)]})
            if include_usage:
                yield sse({**self._head, "choices": [], "usage": usage(answer.usage)})
        except ApiError as error:
            yield sse(error_body(error))
        yield "data: [DONE]\n\n"


def _said(piece: Piece) -> str:
    return "".join(event.text for event in piece.events if isinstance(event, Text))


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
