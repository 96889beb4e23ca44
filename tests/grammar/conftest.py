"""A byte-level vocabulary, the demo model's own, and the schemas of the vendor verifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2lite.demo_folder import DEMO_FOLDER
from k2lite.grammar.vocabulary import Vocabulary
from k2lite.text.byte_tokenizer import write_byte_tokenizer
from k2lite.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def bytes_only(byte_tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(byte_tokenizer, byte_tokenizer.n_vocab)


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_FOLDER)


@pytest.fixture(scope="session")
def demo_words(demo_tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(demo_tokenizer, demo_tokenizer.n_vocab)


@pytest.fixture(scope="session")
def walle(shared: Path) -> list[dict[str, Any]]:
    """Every schema that Moonshot's validator must take."""
    files = sorted((shared / "data" / "vendor-verifier").rglob("valid.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
