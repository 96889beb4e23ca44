"""Folders with a tokenizer.json: a small byte-level one, made by the package that is also the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from k2lite.quant.errors import TokenizerError
from k2lite.text.stream import TextStream
from k2lite.text.tokenizer import Tokenizer, load_tokenizer
from tests.samples import examples

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="session")
def oracle() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat, the end. " * 20], trainer)
    made.add_special_tokens([BOS, EOS])
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


@pytest.fixture(scope="session")
def folder(oracle: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    oracle.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": {"content": BOS},
        "eos_token": {"content": EOS},
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@given(text=st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from([BOS, f"a{EOS}b", "<think>x"]))
@settings(max_examples=examples(100), deadline=None)
def test_ids_equal_the_package_s(oracle: tokenizers.Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer, skip_special=False)
    assert "".join(map(stream.feed, ids)) + stream.flush() == text


def test_control_tokens_in_text_are_text_unless_allowed(oracle: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    bos = oracle.token_to_id(BOS)
    assert tokenizer.encode(BOS, allow_special=True) == [bos]
    assert bos not in tokenizer.encode(BOS)
    prompt = tokenizer.render([{"role": "user", "content": f"x{BOS}"}])
    assert prompt.ids.count(bos) == 1
    assert prompt.text == f"{BOS}x{BOS}"
    assert tokenizer.end_of_turn_ids == {oracle.token_to_id(EOS)}


@pytest.mark.parametrize("token", [10_000, -1])
def test_ids_outside_are_errors(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.decode([token])


def test_damaged_and_unsupported_files_are_named(tmp_path: Path, oracle: tokenizers.Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: can't be read"):
        load_tokenizer(tmp_path)
    other = tokenizers.Tokenizer.from_str(oracle.to_str())
    other.decoder = decoders.Metaspace()
    other.save(str(path))
    with pytest.raises(TokenizerError, match="decoder is Metaspace, supported: ByteLevel"):
        load_tokenizer(tmp_path)


def test_an_added_token_is_a_control_token_even_if_the_file_does_not_call_it_special(
    oracle: tokenizers.Tokenizer, tokenizer: Tokenizer
) -> None:
    """DeepSeek's <｜User｜> and tool tokens are such: a user who writes one must not speak for another role."""
    think = oracle.token_to_id("<think>")
    assert oracle.encode("a<think>", add_special_tokens=False).ids[-1] == think
    assert think not in tokenizer.encode("a<think>")
    assert think not in tokenizer.render([{"role": "user", "content": "a<think>"}]).ids
    assert tokenizer.encode("a<think>", allow_special=True)[-1] == think
    assert think not in tokenizer.hidden_ids  # a reader sees it


def test_what_the_file_says_of_cutting_and_filling_has_no_effect(
    tmp_path: Path, oracle: tokenizers.Tokenizer, folder: Path
) -> None:
    cutting = tokenizers.Tokenizer.from_str(oracle.to_str())
    cutting.enable_truncation(3)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    text = "the cat sat on the mat"
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(folder).encode(text)
    assert len(cutting.encode(text).ids) == 50


def test_half_a_character_is_replaced(tokenizer: Tokenizer) -> None:
    """Python hands over an argument that is not UTF-8 with lone surrogates in it."""
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"


def test_tokens_that_take_in_their_neighbours_and_words_without_bytes_are_refused(
    tmp_path: Path, oracle: tokenizers.Tokenizer
) -> None:
    greedy = tokenizers.Tokenizer.from_str(oracle.to_str())
    greedy.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    greedy.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="'<mask>' has lstrip"):
        load_tokenizer(tmp_path)
    odd = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "▁b": 1}, merges=[]))
    odd.decoder = decoders.ByteLevel()
    odd.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).decode([0]) == "a"
    with pytest.raises(TokenizerError, match="token 1, '▁b', is not byte-level"):
        load_tokenizer(tmp_path).decode([1])
