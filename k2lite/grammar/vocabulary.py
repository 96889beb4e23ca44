"""A tokenizer's tokens as bytes, for masks and for writing any bytes in tokens.

Masks are llguidance's: it takes any grammar of ours, needs neither torch nor a compiler, and many use it (llama.cpp,
vLLM, SGLang); xgrammar pulls in triton and transformers and compiles ahead.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer, TokenizerWrapper

from k2lite.text.tokenizer import Tokenizer

Mask = npt.NDArray[np.bool_]  # [vocab]


class Vocabulary:
    """`vocab_size` is the model's, which may be greater than the tokenizer's. Made once a model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.size = vocab_size
        self._tokenizer = tokenizer
        self.control = frozenset(tokenizer.special_tokens.values())

    @cached_property
    def texts(self) -> list[bytes]:
        """What each ordinary token stands for; empty for control tokens and for ids without a token."""
        known = range(min(self._tokenizer.n_vocab, self.size))
        texts = [b"" if token in self.control else self._tokenizer.token_bytes(token) for token in known]
        return texts + [b""] * (self.size - len(texts))

    @cached_property
    def ordinary(self) -> Mask:
        """True for tokens that are text."""
        return np.array([bool(text) for text in self.texts])

    @cached_property
    def ordinary_bits(self) -> npt.NDArray[np.uint8]:
        """The same, a bit a token, lowest first."""
        return np.packbits(self.ordinary, bitorder="little")

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The token that stands for a text, where one does."""
        return {text: token for token, text in enumerate(self.texts) if text}

    @cached_property
    def _by_byte(self) -> dict[int, int]:
        return {text[0]: token for token, text in enumerate(self.texts) if len(text) == 1}

    @property
    def end_id(self) -> int:
        """A control id that llguidance may take for the end of a text; its masks are cut to ordinary tokens here."""
        return min(self.control)

    @cached_property
    def llguidance(self) -> LLTokenizer:
        """The same for llguidance."""
        return LLTokenizer(TokenizerWrapper(_Wrapped(self)), n_vocab=self.size, eos_token=self.end_id)

    def tokens_of(self, text: bytes) -> list[int]:
        """Ids that spell `text`, as few as the tokenizer makes of it; half a character at an end goes byte by byte."""
        begin = 0
        while begin < min(3, len(text)) and 0x80 <= text[begin] < 0xC0:
            begin += 1
        try:
            rest = self._tokenizer.encode(text[begin:].decode())
        except UnicodeDecodeError:
            return [self._by_byte[byte] for byte in text]
        return [self._by_byte[byte] for byte in text[:begin]] + rest


class _Wrapped:
    """The form in which llguidance takes a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.end_id
        # llguidance wants a text for every token; a special one's begins with 0xff, which no text does
        self.tokens = [text or b"\xff<%d>" % token for token, text in enumerate(vocabulary.texts)]
        self.special_token_ids = [token for token, text in enumerate(vocabulary.texts) if not text]
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        return self._vocabulary.tokens_of(text if isinstance(text, bytes) else text.encode())
