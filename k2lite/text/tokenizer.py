"""What every tokenizer does, and which kind a folder holds.

Invariant: a control token comes from the chat template or from a caller who asked for it (`allow_special`), never
from text that a user wrote. A folder without tokenizer files gets a tokenizer whose text functions raise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2lite.quant.errors import TokenizerError

from .chat_template import ChatTemplate

KIMI_FILE = "tiktoken.model"
HF_FILE = "tokenizer.json"
NO_MASK: Mapping[int, str] = {}


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: what a person may read, and what the model reads."""

    text: str
    ids: list[int]


class Tokenizer(ABC):
    """`special_tokens` maps every control token's text to its id; ids in `hidden_ids` are those that readers of an
    answer don't see; an id in `end_of_turn_ids` ends an answer."""

    n_vocab: int
    special_tokens: Mapping[str, int]
    hidden_ids: frozenset[int]
    end_of_turn_ids: frozenset[int]
    template: ChatTemplate | None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Control tokens written in it are plain text unless `allow_special`. Adds no BOS."""
        return self.encode_masked(text, allow_special=allow_special, unmask=NO_MASK)

    @abstractmethod
    def encode_masked(self, text: str, *, allow_special: bool, unmask: Mapping[int, str]) -> list[int]:
        """Like `encode`; after control tokens were looked for, `unmask` (a table for str.translate, one character for
        one) restores the characters that hid what is not to be one."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a control token's are its name's. Raises TokenizerError for an id outside."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves hidden tokens out."""
        hidden = self.hidden_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(token) for token in ids if token not in hidden).decode("utf-8", "replace")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool = True,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """A conversation through the folder's chat template. What the messages and tools contain is never a control
        token; `thinking` and `preserve_thinking` matter to templates that know them (K2.5 and later)."""
        if self.template is None:
            raise TokenizerError("this folder has no chat template; give the prompt itself (k2lite run --raw)")
        masked = self.template.render(
            messages,
            tools,
            control_tokens=self.special_tokens,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=add_generation_prompt,
        )
        ids = self.encode_masked(masked.text, allow_special=True, unmask=masked.unmask)
        return Prompt(masked.text.translate(masked.unmask), ids)


class MissingTokenizer(Tokenizer):
    """Stands in where a folder has no tokenizer: ids work, text raises TokenizerError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.n_vocab = 0
        self.special_tokens = {}
        self.hidden_ids = frozenset()
        self.end_of_turn_ids = frozenset()
        self.template = None

    def encode_masked(self, text: str, *, allow_special: bool, unmask: Mapping[int, str]) -> list[int]:  # noqa: ARG002
        raise self._error()

    def token_bytes(self, token: int) -> bytes:  # noqa: ARG002
        raise self._error()

    def render(self, *_: Any, **__: Any) -> Prompt:
        raise self._error()

    def _error(self) -> TokenizerError:
        return TokenizerError(
            f"{self._folder}: found neither {KIMI_FILE} nor {HF_FILE}, so there is no text, only token ids; "
            "download the tokenizer files into the folder"
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises TokenizerError where its files are damaged."""
    if (folder / KIMI_FILE).is_file():
        from .kimi_tokenizer import KimiTokenizer

        return KimiTokenizer(folder)
    if (folder / HF_FILE).is_file():
        from .hf_tokenizer import HfTokenizer

        return HfTokenizer(folder)
    return MissingTokenizer(folder)
