"""Kimi's tokenizer as the metadata of a GGUF file, and back.

The ranks of tiktoken.model are the ids of the tokens there, so the way back is exact. Merges, which llama.cpp encodes
with and Kimi's own tokenizer does not have, are found by splitting each token with the ranks below its own.
Which control tokens a reader sees (`special` false) GGUF files don't say; those of tool calls and of thinking do.
Source: llama.cpp, conversion/deepseek.py. Its splitter for "kimi-k2" differs from Kimi's pattern: see docs/gguf.md.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from k2lite.quant.errors import TokenizerError
from k2lite.quant.gguf_writer import Int32

from .kimi_tokenizer import CONTROL_SLOTS, DEFAULT_CONTROL_TOKENS, TOOL_SLOTS, read_ranks
from .tokenizer import HF_FILE, KIMI_FILE, load_tokenizer
from .tokenizer_files import CONFIG_NAME, TEMPLATE_NAME, read_tokenizer_config, token_text

MODEL, PRE = "gpt2", "kimi-k2"
NORMAL, CONTROL, UNUSED = 1, 3, 5
NAMED_IDS = ("bos", "eos", "pad", "unk")
_GGUF_NAMES = {"unk": "unknown", "pad": "padding"}
_SHOWN = frozenset(DEFAULT_CONTROL_TOKENS[slot] for slot in TOOL_SLOTS) | {"<think>", "</think>"}


def tokenizer_metadata(folder: Path, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """Keys and values for the tokenizer and chat template of a model folder, and what its user should know. A folder
    without tiktoken.model gives a file without tokens, which llama.cpp runs on ids only."""
    if not (folder / KIMI_FILE).is_file():
        found = HF_FILE if (folder / HF_FILE).is_file() else f"no {KIMI_FILE}"
        note = f"{folder}: found {found}: the file will hold no tokenizer, so llama.cpp takes token ids only"
        return {"tokenizer.ggml.model": "none"}, [note]
    ranks = read_ranks(folder / KIMI_FILE)
    tokenizer = load_tokenizer(folder)
    control = {id: text for text, id in tokenizer.special_tokens.items()}
    tokens = [*map(_as_text, ranks), *(control[id] for id in sorted(control))]
    kinds = [NORMAL] * len(ranks) + [CONTROL] * len(control)
    for id in range(len(tokens), vocab_size):
        tokens.append(f"[PAD{id}]")
        kinds.append(UNUSED)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": PRE,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [Int32(kind) for kind in kinds],
        "tokenizer.ggml.merges": merges(ranks),
        "tokenizer.ggml.add_bos_token": False,
    }
    config = read_tokenizer_config(folder)
    for name in NAMED_IDS:
        named = token_text(config.get(f"{name}_token"))
        if named is not None and named in tokenizer.special_tokens:
            metadata[f"tokenizer.ggml.{_GGUF_NAMES.get(name, name)}_token_id"] = tokenizer.special_tokens[named]
    if tokenizer.template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.template.source
    return metadata, []


def merges(ranks: Mapping[bytes, int]) -> list[str]:
    """The pair that each token is made of, in the order of ranks. A token that its pieces never reach has none."""
    found = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _split_below(ranks, token, rank)
            if len(parts) == 2:
                found.append(" ".join(map(_as_text, parts)))
    return found


def _split_below(ranks: Mapping[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """`token` by byte-pair merging with ranks below `limit`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(candidates)
        if best >= limit:
            break
        at = candidates.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tokenizer_files(metadata: Mapping[str, Any], path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a folder that hold a GGUF file's tokenizer, by name, and what the user should know: a tokenizer of
    another kind than Kimi's is not made anew. Raises TokenizerError for one that contradicts itself."""
    files: dict[str, bytes] = {}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files[TEMPLATE_NAME] = template.encode("utf-8")
    model, pre = metadata.get("tokenizer.ggml.model", "none"), metadata.get("tokenizer.ggml.pre")
    if model == "none":
        return files, [f"{path}: holds no tokenizer; put the model's tokenizer files into the folder"]
    if (model, pre) != (MODEL, PRE):
        return files, [
            f"{path}: its tokenizer is {model!r}, {pre!r}; put the model's own tokenizer files into the folder"
        ]
    tokens, kinds = _vocabulary(metadata, path)
    n_ranks = next((id for id, kind in enumerate(kinds) if kind != NORMAL), len(kinds))
    control = tokens[n_ranks : n_ranks + CONTROL_SLOTS]
    if len(control) < CONTROL_SLOTS or NORMAL in kinds[n_ranks:]:
        raise TokenizerError(
            f"{path}: tokenizer.ggml.tokens has {n_ranks} ordinary tokens and {len(control)} after them; expected "
            f"{CONTROL_SLOTS} control tokens behind the ordinary ones, as in Kimi's tokenizer"
        )
    lines = []
    for rank, text in enumerate(tokens[:n_ranks]):
        lines.append(base64.b64encode(_as_bytes(text, rank, path)) + b" %d\n" % rank)
    files[KIMI_FILE] = b"".join(lines)
    files[CONFIG_NAME] = _tokenizer_config(metadata, dict(enumerate(control, n_ranks)))
    return files, []


def _tokenizer_config(metadata: Mapping[str, Any], control: Mapping[int, str]) -> bytes:
    named = {
        str(id): {"content": text, "special": text not in _SHOWN}
        for id, text in control.items()
        if text not in (f"<|reserved_token_{id}|>", f"[PAD{id}]")
    }
    config: dict[str, Any] = {"added_tokens_decoder": named}
    for name in NAMED_IDS:
        id = metadata.get(f"tokenizer.ggml.{_GGUF_NAMES.get(name, name)}_token_id")
        if isinstance(id, int) and id in control:
            config[f"{name}_token"] = control[id]
    config["tokenizer_class"] = "TikTokenTokenizer"
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _vocabulary(metadata: Mapping[str, Any], path: Path) -> tuple[list[str], list[int]]:
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or kinds is None or len(kinds) != len(tokens):
        raise TokenizerError(f"{path}: expected tokenizer.ggml.tokens and as many of tokenizer.ggml.token_type")
    return tokens, [int(kind) for kind in kinds]


@cache
def _alphabet() -> tuple[dict[int, str], dict[str, int]]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + at) for at, byte in enumerate(rest)}
    return letters, {letter: byte for byte, letter in letters.items()}


def _as_text(token: bytes) -> str:
    letters = _alphabet()[0]
    return "".join(letters[byte] for byte in token)


def _as_bytes(text: str, id: int, path: Path) -> bytes:
    try:
        return bytes(_alphabet()[1][letter] for letter in text)
    except KeyError as error:
        raise TokenizerError(
            f"{path}: token {id} holds {error}, which stands for no byte in GPT-2's spelling"
        ) from None
