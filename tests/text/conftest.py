"""Tokenizers: the real vocabulary from ../shared, and a byte-level one that needs nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from k2lite.text.byte_tokenizer import write_byte_tokenizer
from k2lite.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def kimi_folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K2.6's vocabulary and names; a test puts the template of its choice beside them."""
    folder = tmp_path_factory.mktemp("kimi")
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copy(shared / "data" / "Kimi-K2.6" / name, folder)
    return folder


@pytest.fixture(scope="session")
def kimi(kimi_folder: Path) -> Tokenizer:
    return load_tokenizer(kimi_folder)


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder: Path) -> Tokenizer:
    return load_tokenizer(byte_folder)
