"""A conversation through the folder's own Jinja template, in Hugging Face's sandbox, with the user's text kept apart.

Invariant: a control token in the result that is not hidden behind the mask was written by the template, not by a
message. Wherever a message or tool could spell a control token, alone or together with what follows, the first
character is replaced by one that occurs nowhere; `Masked.unmask` puts it back after control tokens were looked for. A
template that writes the first half of a control token and lets a message write the other is not guarded against: no
published template does, and some name a role token by the message's role on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from k2lite.quant.errors import TokenizerError

from .typescript_tools import tools_as_typescript

# Private-use characters of plane 16, the last place where a text would have some of its own.
_MASK_CHARACTERS = range(0x10FFFD, 0x10F000, -1)


@dataclass(frozen=True)
class Masked:
    """A rendered text, and the table for str.translate that restores what was hidden."""

    text: str
    unmask: Mapping[int, str]


class ChatTemplate:
    """`path` is named in errors; `variables` are what else the template may use (bos_token and the like)."""

    def __init__(self, source: str, path: Path, variables: Mapping[str, str]) -> None:
        self.source = source
        self._path = path
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # not only TemplateError: one nested too deeply exhausts the compiler
            raise self._error(error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        control_tokens: Iterable[str],
        thinking: bool,
        preserve_thinking: bool,
        add_generation_prompt: bool,
    ) -> Masked:
        """Render `messages` (role, content, ...) and `tools` (OpenAI's form). Raises TokenizerError, which names the
        template and the line, for a template that fails or a message that is not one."""
        # a template that asks for the TypeScript form has tools with sorted keys, in JSON too if there is no such form
        takes_typescript = "tools_ts_str" in self.source
        declared = (_sorted_keys(tools) if takes_typescript else list(tools)) if tools else None
        typescript = tools_as_typescript(declared) if declared and takes_typescript else None
        cleaned = [_without_nulls(message, place) for place, message in enumerate(messages)]
        mask = _Mask(control_tokens, [self.source, cleaned, declared, typescript])
        context = {
            "messages": mask.hide(cleaned),
            "tools": mask.hide(declared),
            "tools_ts_str": mask.hide(typescript),
            "thinking": thinking,
            "preserve_thinking": preserve_thinking,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render({**self._variables, **context})
        except Exception as error:  # a template may raise anything: it is a program that came with the weights
            raise self._error(error) from error
        return Masked(text, mask.unmask)

    def _error(self, error: Exception) -> TokenizerError:
        line = getattr(error, "lineno", None)
        trace = error.__traceback__
        while line is None and trace is not None:
            if trace.tb_frame.f_code.co_filename == "<template>":
                line = trace.tb_lineno
            trace = trace.tb_next
        at = f", line {line}" if line else ""
        return TokenizerError(f"{self._path}{at}: the chat template failed: {type(error).__name__}: {error}")


class _Mask:
    """Replaces the first character of every control token that a text spells or could spell with what follows it."""

    def __init__(self, control_tokens: Iterable[str], everything: list[Any]) -> None:
        self._tokens = [token for token in control_tokens if token]
        self._prefixes = _prefixes(tuple(self._tokens))
        self._longest = max(map(len, self._tokens), default=0)
        used = set(json.dumps(everything, ensure_ascii=False, default=str))
        free = (chr(code) for code in _MASK_CHARACTERS if chr(code) not in used)
        self._hidden = {first: next(free) for first in sorted({token[0] for token in self._tokens})}
        self.unmask = {ord(stand_in): first for first, stand_in in self._hidden.items()}

    def hide(self, value: Any) -> Any:
        """`value` with every string in it masked, keys of objects too."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def hide_whole(self, text: str) -> str:
        """Only the control tokens that `text` itself spells: how a template's own search words look once hidden."""
        return self._replaced(text, self._is_control)

    def _hide_text(self, text: str) -> str:
        hidden = self._replaced(text, self._could_be_control)
        return text if hidden == text else _HiddenText.of(hidden, self)

    def _replaced(self, text: str, wanted: Callable[[str, int], bool]) -> str:
        out = list(text)
        for at, character in enumerate(text):
            if character in self._hidden and wanted(text, at):
                out[at] = self._hidden[character]
        return "".join(out)

    def _is_control(self, text: str, at: int) -> bool:
        return any(text.startswith(token, at) for token in self._tokens if token[0] == text[at])

    def _could_be_control(self, text: str, at: int) -> bool:
        if self._is_control(text, at):
            return True
        # the end of one text may complete a name with the beginning of the next
        return len(text) - at < self._longest and text[at:] in self._prefixes


class _HiddenText(str):
    """A text with something hidden in it. A template finds in it what it would find in the text as written: to cut old
    reasoning it searches for </think>. What is cut from it is such a text again."""

    _mask: _Mask

    @classmethod
    def of(cls, text: str, mask: _Mask) -> _HiddenText:
        made = cls(text)
        made._mask = mask
        return made


def _searching(name: str) -> Callable[..., Any]:
    """str's method of this name, for a hidden text."""
    method = getattr(str, name)

    def search(self: _HiddenText, *args: Any, **kwargs: Any) -> Any:
        words = [self._mask.hide_whole(word) if isinstance(word, str) else word for word in args]
        return _again_hidden(method(self, *words, **kwargs), self._mask)

    return search


def _again_hidden(value: Any, mask: _Mask) -> Any:
    if isinstance(value, str):
        return _HiddenText.of(value, mask)
    if isinstance(value, list | tuple):
        return type(value)(_again_hidden(item, mask) for item in value)
    return value


for _name in (
    *("__contains__", "__getitem__", "count", "find", "index", "rfind", "rindex", "startswith", "endswith"),
    *("split", "rsplit", "splitlines", "partition", "rpartition", "replace", "removeprefix", "removesuffix"),
    *("strip", "lstrip", "rstrip"),
):
    setattr(_HiddenText, _name, _searching(_name))


@lru_cache(maxsize=4)
def _prefixes(tokens: tuple[str, ...]) -> frozenset[str]:
    """What the tokens begin with; kept, because a model has thousands and every prompt asks."""
    return frozenset(token[:length] for token in tokens for length in range(1, len(token)))


def _environment() -> Any:
    """Jinja as Hugging Face sets it up for chat templates (transformers, utils/chat_template_utils.py)."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _without_nulls(message: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A message without its null keys, which templates would print as the word None; a null content is meant."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TokenizerError(f"message {place} has no role: expected an object with role and content")
    cleaned = {key: value for key, value in message.items() if value is not None or key == "content"}
    for key in ("content", "tool_calls"):
        if isinstance(cleaned.get(key), list):
            cleaned[key] = [_entry_without_nulls(entry) for entry in cleaned[key]]
    return cleaned


def _entry_without_nulls(entry: Any) -> Any:
    """The same for a content part or a tool call; a null inside a call's arguments is the model's own."""
    if not isinstance(entry, Mapping):
        return entry
    kept = {key: value for key, value in entry.items() if value is not None}
    return {key: _entry_without_nulls(value) if key == "function" else value for key, value in kept.items()}


def _sorted_keys(value: Any) -> Any:
    """Objects with their keys in order, all the way down, as Moonshot's wrapper passes tools."""
    if isinstance(value, Mapping):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted_keys(item) for item in value]
    return value
