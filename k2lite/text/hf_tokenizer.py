"""Folders with a tokenizer.json (DeepSeek-V3, R1), through Hugging Face's `tokenizers` package, an extra.

Every added token is a control token, whether the file calls it special or not: DeepSeek's role and tool tokens are not.
Only byte-level models are taken: a token of another kind has no bytes of its own, and a stream could not be cut at
characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2lite.quant.errors import TokenizerError

from .tokenizer import HF_FILE, Tokenizer
from .tokenizer_files import read_template, read_tokenizer_config, special_pattern, token_text

# What a file may add to plain encoding: tokens found anywhere in a text, texts cut or filled to a length.
_LEFT_OUT: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


class HfTokenizer(Tokenizer):
    """tokenizer.json with tokenizer_config.json and a chat template, the last two optional."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / HF_FILE
        whole, self._ordinary = _open(self._path)
        config = read_tokenizer_config(folder)
        vocabulary = whole.get_vocab(with_added_tokens=True)
        added = whole.get_added_tokens_decoder()
        self.n_vocab = max(vocabulary.values(), default=-1) + 1
        self.special_tokens = {token.content: int(number) for number, token in added.items()}
        self.hidden_ids = frozenset(int(number) for number, token in added.items() if token.special)
        end = vocabulary.get(token_text(config.get("eos_token")) or "")
        self.end_of_turn_ids = frozenset() if end is None else frozenset([int(end)])
        self.template = read_template(folder, config)
        self._added: dict[int, bytes] = {number: text.encode() for text, number in self.special_tokens.items()}
        self._pattern = special_pattern(self.special_tokens)

    def encode_masked(self, text: str, *, allow_special: bool, unmask: Mapping[int, str]) -> list[int]:
        ids: list[int] = []
        parts = self._pattern.split(text) if allow_special and self._pattern else [text]
        for place, part in enumerate(parts):
            if place % 2:  # what the pattern found stands between the rest
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._ordinary.encode(_whole_characters(part.translate(unmask)), add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._ordinary.id_to_token(int(token)) if 0 <= token < self.n_vocab else None
        if text is None:
            raise TokenizerError(f"token id {int(token)} is outside the vocabulary of {self.n_vocab}")
        try:
            return bytes(_BYTE_OF[character] for character in text)
        except KeyError:
            raise TokenizerError(f"{self._path}: token {int(token)}, {text[:40]!r}, is not byte-level") from None


def _open(path: Path) -> tuple[Any, Any]:
    """The tokenizer as the file says, and the same without what it adds to plain encoding."""
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(
            f"{path}: reading it takes the tokenizers package: pip install 'k2lite[tokenizers]'"
        ) from error
    try:
        text = path.read_text(encoding="utf-8")
        whole = tokenizers.Tokenizer.from_str(text)
        ordinary = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(text), **_LEFT_OUT}))
    except Exception as error:  # the package raises plain Exception for a damaged file
        raise TokenizerError(f"{path}: can't be read: {error!s:.100}; download it again") from error
    if type(whole.decoder).__name__ != "ByteLevel":
        raise TokenizerError(f"{path}: the decoder is {type(whole.decoder).__name__}, supported: ByteLevel")
    for token in whole.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word:
            raise TokenizerError(
                f"{path}: token {token.content!r} has lstrip, rstrip or single_word; supported: false for all three"
            )
    return whole, ordinary


def _whole_characters(text: str) -> str:
    """`text` with lone surrogates, which the package refuses, made U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet of a printable character for every byte: the printable ones stand for themselves, the others
    take the characters from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = byte_of_character()
