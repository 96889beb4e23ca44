"""Writes the smallest Kimi tokenizer there can be: one token a byte, and the 256 control slots behind them."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path

from .kimi_tokenizer import CONTROL_SLOTS, DEFAULT_CONTROL_TOKENS, TOOL_SLOTS
from .tokenizer import KIMI_FILE
from .tokenizer_files import CONFIG_NAME, TEMPLATE_NAME

N_BYTES = 256
N_VOCAB = N_BYTES + CONTROL_SLOTS


def write_byte_tokenizer(folder: Path) -> None:
    """tiktoken.model, tokenizer_config.json and chat_template.jinja for a vocabulary of 512."""
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(N_BYTES)]
    (folder / KIMI_FILE).write_text("".join(ranks), encoding="ascii")
    names = {
        str(N_BYTES + slot): {"content": name, "special": slot not in TOOL_SLOTS}
        for slot, name in DEFAULT_CONTROL_TOKENS.items()
    }
    config = {"added_tokens_decoder": names, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / TEMPLATE_NAME).write_text(own_template(), encoding="utf-8")


def own_template() -> str:
    """The text of k2lite's own chat template in Kimi-K2's message format."""
    return files("k2lite.text").joinpath("k2_template.jinja").read_text(encoding="utf-8")
