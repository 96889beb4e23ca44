"""Kimi's tokenizer: a tiktoken file of byte-pair ranks, Kimi's split pattern, and 256 control slots behind the ranks.

The same file serves every Kimi-K2; only the names of the control slots differ between generations, and those come
from tokenizer_config.json. Source of pattern and cuts: Moonshot's tokenization_kimi.py.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import tiktoken

from k2lite.quant.errors import TokenizerError

from .tokenizer import KIMI_FILE, Tokenizer
from .tokenizer_files import (
    CONFIG_NAME,
    AddedToken,
    added_tokens,
    read_template,
    read_tokenizer_config,
    special_pattern,
    token_text,
)

CONTROL_SLOTS = 256
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# K2-Instruct's names by slot, for a folder that has lost its tokenizer_config.json.
DEFAULT_CONTROL_TOKENS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
# These are part of an answer: a reader must see them to act on them.
TOOL_SLOTS = range(11, 16)
END_OF_TURN = ("[EOS]", "<|im_end|>")


class KimiTokenizer(Tokenizer):
    """tiktoken.model with tokenizer_config.json and a chat template, the last two optional."""

    def __init__(self, folder: Path) -> None:
        ranks = read_ranks(folder / KIMI_FILE)
        config = read_tokenizer_config(folder)
        names = _control_names(len(ranks), added_tokens(config, folder / CONFIG_NAME), folder / CONFIG_NAME)
        self.n_vocab = len(ranks) + CONTROL_SLOTS
        self.special_tokens = {token.content: token.id for token in names}
        self.hidden_ids = frozenset(token.id for token in names if token.special)
        ends = (*END_OF_TURN, token_text(config.get("eos_token")))
        self.end_of_turn_ids = frozenset(self.special_tokens[name] for name in ends if name in self.special_tokens)
        self.template = read_template(folder, config)
        self._control_bytes = {token.id: token.content.encode() for token in names}
        self._pattern = special_pattern(self.special_tokens)
        self._ordinary = tiktoken.Encoding(
            name=str(folder), pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode_masked(self, text: str, *, allow_special: bool, unmask: Mapping[int, str]) -> list[int]:
        ids: list[int] = []
        for piece in _cut(text):
            parts = self._pattern.split(piece) if allow_special and self._pattern else [piece]
            for place, part in enumerate(parts):
                if place % 2:  # what the pattern found stands between the rest
                    ids.append(self.special_tokens[part])
                elif part:
                    ids += self._ordinary.encode_ordinary(part.translate(unmask) if unmask else part)
        return ids

    def token_bytes(self, token: int) -> bytes:
        if token in self._control_bytes:
            return self._control_bytes[token]
        try:
            return self._ordinary.decode_single_token_bytes(int(token))
        except (KeyError, OverflowError):
            raise TokenizerError(f"token id {int(token)} is outside the vocabulary of {self.n_vocab}") from None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank from a tiktoken file: one base64 word and a rank a line, ranks from 0 without a gap, every
    single byte among them. Raises TokenizerError naming the line."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(f"{path}: can't be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            if int(rank) != len(ranks) or not token or token in ranks:
                raise ValueError
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{path}, line {number}: found {line[:60]!r}, expected a new token in base64 and the rank "
                f"{len(ranks)}; download the file again"
            ) from None
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: byte {missing[0]} has no token, so some texts can't be encoded")
    return ranks


def _control_names(base: int, named: list[AddedToken], path: Path) -> list[AddedToken]:
    """All control slots with their names; a slot without one is <|reserved_token_ID|>."""
    outside = next((token for token in named if not base <= token.id < base + CONTROL_SLOTS), None)
    if outside is not None:
        raise TokenizerError(
            f"{path}: token {outside.content!r} has id {outside.id}, expected {base} to {base + CONTROL_SLOTS - 1} "
            f"({KIMI_FILE} has {base} ranks)"
        )
    if not named:
        named = [AddedToken(base + slot, name, slot not in TOOL_SLOTS) for slot, name in DEFAULT_CONTROL_TOKENS.items()]
    by_id = {token.id: token for token in named}
    slots = range(base, base + CONTROL_SLOTS)
    tokens = [by_id.get(slot) or AddedToken(slot, f"<|reserved_token_{slot}|>", True) for slot in slots]
    if len({token.content for token in tokens}) != CONTROL_SLOTS:
        raise TokenizerError(f"{path}: two control tokens have the same text")
    return tokens


def _cut(text: str) -> Iterator[str]:
    """Moonshot's cuts: every 400,000 characters, and inside those wherever a run of white space or of anything else
    would exceed 25,000. They change ids of very long texts, so they are part of the encoding."""
    for start in range(0, len(text), MAX_CHARACTERS):
        yield from _cut_runs(text[start : start + MAX_CHARACTERS])


def _cut_runs(text: str) -> Iterator[str]:
    begin = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[begin:cut]
            begin = cut
    if begin < len(text):
        yield text[begin:]
