"""tokenizer_config.json, the chat template beside it, and the pattern that finds control tokens in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2lite.quant.errors import TokenizerError

from .chat_template import ChatTemplate

CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True)
class AddedToken:
    """An entry of added_tokens_decoder. A `special` one is not shown to readers of an answer."""

    id: int
    content: str
    special: bool


def read_tokenizer_config(folder: Path) -> Mapping[str, Any]:
    """The JSON object, empty where the folder has none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: can't be read as JSON: {error!s:.100}; download it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def added_tokens(config: Mapping[str, Any], path: Path) -> list[AddedToken]:
    """The entries of added_tokens_decoder, by id."""
    entries = config.get("added_tokens_decoder") or {}
    try:
        tokens = [
            AddedToken(int(key), entry["content"], bool(entry.get("special", False))) for key, entry in entries.items()
        ]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(f"{path}: added_tokens_decoder must map ids to objects with a content") from error
    if not all(isinstance(token.content, str) and token.content and _is_unicode(token.content) for token in tokens):
        raise TokenizerError(f"{path}: added_tokens_decoder holds a token without text, or with half a character")
    return sorted(tokens, key=lambda token: token.id)


def read_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """chat_template.jinja, else the config's chat_template: a string, or a list of which "default" is taken."""
    path = folder / TEMPLATE_NAME
    named = {name: token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    variables = {name: text for name, text in named.items() if text is not None}
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), path, variables)
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: can't be read: {error}") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        defaults = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = defaults[0].get("template") if defaults else None
    return ChatTemplate(source, folder / CONFIG_NAME, variables) if isinstance(source, str) else None


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of the control tokens, the longest first; None if there are none. Its one group makes re.split
    keep what it found."""
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None


def _is_unicode(text: str) -> bool:
    """False for a text with a lone surrogate, which JSON can spell and UTF-8 can't."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def token_text(value: Any) -> str | None:
    """A token as a config spells it: its text, or an object with a content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
