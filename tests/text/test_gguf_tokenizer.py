"""Kimi's tokenizer through GGUF metadata: files come back byte for byte, and the merges encode as the ranks do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from k2lite.demo_folder import DEMO_FOLDER
from k2lite.quant.errors import TokenizerError
from k2lite.text.gguf_tokenizer import merges, tokenizer_files, tokenizer_metadata
from k2lite.text.kimi_tokenizer import read_ranks

PATH = Path("m.gguf")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    made, notes = tokenizer_metadata(DEMO_FOLDER, 4100)
    assert notes == []
    # as they are read: plain numbers
    return made | {"tokenizer.ggml.token_type": [kind.value for kind in made["tokenizer.ggml.token_type"]]}


def test_the_files_come_back_as_they_were(metadata: dict[str, Any]) -> None:
    files, notes = tokenizer_files(metadata, PATH)
    assert notes == []
    for name in ("tiktoken.model", "chat_template.jinja"):
        assert files[name] == (DEMO_FOLDER / name).read_bytes(), name
    config = json.loads((DEMO_FOLDER / "tokenizer_config.json").read_text())
    assert json.loads(files["tokenizer_config.json"]) == config


def test_ids_are_ranks_then_control_slots_then_unused(metadata: dict[str, Any]) -> None:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 4100
    assert (kinds[:3840], kinds[3840:4096], kinds[4096:]) == ([1] * 3840, [3] * 256, [5] * 4)
    assert tokens[3842] == "<|im_end|>"
    assert tokens[4099] == "[PAD4099]"
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (3840, 3841)


def test_merges_encode_as_ranks_do(metadata: dict[str, Any]) -> None:
    """Another implementation of byte-pair encoding gives each token back from its bytes, with these merges alone."""
    tokens = metadata["tokenizer.ggml.tokens"][:3840]
    pairs = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    encoder = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=pairs))
    reached = [encoder.encode(token).ids == [id] for id, token in enumerate(tokens)]
    single = sum(len(token) == 1 for token in tokens)
    assert sum(reached) == single + len(pairs)
    assert sum(reached) > 3700


def test_a_token_that_its_pieces_never_reach_has_no_merge() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"ab": 256, b"abc": 257, b"xyz": 258}
    assert merges(ranks) == ["a b", "ab c"]


def test_the_published_tokenizer_comes_back(shared: Path) -> None:
    """Without merges, which take a minute: the way back does not need them."""
    from k2lite.text import gguf_tokenizer

    ranks = read_ranks(shared / "data/Kimi-K2.6/tiktoken.model")
    letters = [gguf_tokenizer._as_text(token) for token in ranks]
    control = [f"<|reserved_token_{id}|>" for id in range(len(ranks), len(ranks) + 256)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": letters + control,
        "tokenizer.ggml.token_type": [1] * len(ranks) + [3] * 256,
    }
    files, _ = tokenizer_files(metadata, PATH)
    assert files["tiktoken.model"].splitlines() == (shared / "data/Kimi-K2.6/tiktoken.model").read_bytes().splitlines()


def test_another_tokenizer_is_a_note_and_a_contradiction_an_error(metadata: dict[str, Any], tmp_path: Path) -> None:
    files, notes = tokenizer_files({**metadata, "tokenizer.ggml.pre": "deepseek-v3"}, PATH)
    assert set(files) == {"chat_template.jinja"}
    assert "put the model's own tokenizer files into the folder" in notes[0]
    assert tokenizer_files({}, PATH)[0] == {}
    made, notes = tokenizer_metadata(tmp_path, 10)
    assert made == {"tokenizer.ggml.model": "none"}
    assert "takes token ids only" in notes[0]
    tokens = list(metadata["tokenizer.ggml.tokens"])
    for change, message in (
        ({"tokenizer.ggml.tokens": tokens[:-1]}, "as many of tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.token_type": [1] * 4100}, "4100 ordinary tokens and 0 after them"),
        ({"tokenizer.ggml.tokens": ["a b", *tokens[1:]]}, "token 0 holds ' ', which stands for no byte"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizer_files({**metadata, **change}, PATH)
