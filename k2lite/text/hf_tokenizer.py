"""Folders with a tokenizer.json (DeepSeek-V3, R1), through Hugging Face's `tokenizers` package, an extra.

Control tokens are the added tokens that the file marks as special. Only byte-level models are taken: a token of
another kind has no bytes of its own, and a stream could not be cut at characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2lite.quant.errors import TokenizerError

from .tokenizer import HF_FILE, Tokenizer
from .tokenizer_files import read_template, read_tokenizer_config, special_pattern, token_text


class HfTokenizer(Tokenizer):
    """tokenizer.json with tokenizer_config.json and a chat template, the last two optional."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / HF_FILE
        self._tokenizer = _open(self._path)
        # makes control tokens in a text plain text; `encode_masked` looks for them itself
        self._tokenizer.encode_special_tokens = True
        config = read_tokenizer_config(folder)
        added = self._tokenizer.get_added_tokens_decoder()
        self.n_vocab = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_tokens = {token.content: int(number) for number, token in added.items() if token.special}
        self.hidden_ids = frozenset(self.special_tokens.values())
        end = self._tokenizer.token_to_id(token_text(config.get("eos_token")) or "")
        self.end_of_turn_ids = frozenset() if end is None else frozenset([end])
        self.template = read_template(folder, config)
        self._added: dict[int, bytes] = {int(number): token.content.encode() for number, token in added.items()}
        self._pattern = special_pattern(self.special_tokens)

    def encode_masked(self, text: str, *, allow_special: bool, unmask: Mapping[int, str]) -> list[int]:
        ids: list[int] = []
        parts = self._pattern.split(text) if allow_special and self._pattern else [text]
        for place, part in enumerate(parts):
            if place % 2:  # what the pattern found stands between the rest
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._tokenizer.encode(part.translate(unmask), add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._tokenizer.id_to_token(int(token)) if token >= 0 else None
        if text is None:
            raise TokenizerError(f"token id {int(token)} is outside the vocabulary of {self.n_vocab}")
        return bytes(_BYTE_OF[character] for character in text)


def _open(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(
            f"{path}: reading it takes the tokenizers package: pip install 'k2lite[tokenizers]'"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for a damaged file
        raise TokenizerError(f"{path}: can't be read: {error!s:.100}; download it again") from error
    if type(tokenizer.decoder).__name__ != "ByteLevel":
        raise TokenizerError(f"{path}: the decoder is {type(tokenizer.decoder).__name__}, supported: ByteLevel")
    return tokenizer


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet of a printable character for every byte: the printable ones stand for themselves, the others
    take the characters from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = byte_of_character()
