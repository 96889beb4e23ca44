"""Kimi's tokenizer against golden ids, against a plain BPE loop over the `regex` package, and on damaged files."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings, strategies as st

from k2lite.quant.errors import TokenizerError
from k2lite.text.kimi_tokenizer import SPLIT_PATTERN, _cut, read_ranks
from k2lite.text.tokenizer import Tokenizer, load_tokenizer
from tests.samples import examples


@pytest.fixture(scope="session")
def golden(shared: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((shared / "data/derived/tokenizer_golden.json").read_text(encoding="utf-8"))
    return value


def test_golden_texts_with_and_without_specials(kimi: Tokenizer, golden: dict[str, Any]) -> None:
    assert len(golden["cases"]) == 35
    for case in golden["cases"]:
        assert kimi.encode(case["text"], allow_special=True) == case["ids_special"], case["text"]
        assert kimi.encode(case["text"]) == case["ids_plain"], case["text"]
        assert kimi.decode(case["ids_plain"]) == case["text"]
        assert kimi.decode(case["ids_special"]) == case["text"]


def test_the_pattern_and_the_special_tokens_are_kimi_s(kimi: Tokenizer, golden: dict[str, Any]) -> None:
    assert golden["pat_str"] == SPLIT_PATTERN
    assert dict(kimi.special_tokens) == golden["special_tokens"]
    assert kimi.n_vocab == golden["n_vocab"] == 163840


def test_both_end_of_turn_ids_stop_a_chat(kimi: Tokenizer) -> None:
    assert kimi.end_of_turn_ids == {163585, 163586}


# formats.md 7.2: the names of each generation where they differ.
GENERATIONS = {
    "K2-Instruct": {163602: None, 163606: None, 163586: "<|im_end|>"},
    "K2-Thinking": {163602: None, 163606: "<think>", 163607: "</think>"},
    "K2.6": {163602: "<|media_begin|>", 163606: "<think>", 163607: "</think>"},
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_special_tokens_of_each_generation(kimi_folder: Path, tmp_path: Path, generation: str) -> None:
    """A slot without a name is reserved, and <think> is plain text where it has no slot."""
    names = GENERATIONS[generation]
    config = json.loads((kimi_folder / "tokenizer_config.json").read_text())
    for slot, name in names.items():
        if name is None:
            config["added_tokens_decoder"].pop(str(slot))
            config["added_tokens_decoder"].pop(str(slot + 1), None)
    shutil.copy(kimi_folder / "tiktoken.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    for slot, name in names.items():
        expected = name or f"<|reserved_token_{slot}|>"
        assert tokenizer.special_tokens[expected] == slot
        assert tokenizer.encode(expected, allow_special=True) == [slot]
    thinks = tokenizer.encode("<think>", allow_special=True)
    assert (thinks == [163606]) == (names[163606] is not None if 163606 in names else True)


def test_without_tokenizer_config_the_names_are_k2_instruct_s(kimi_folder: Path, tmp_path: Path) -> None:
    shutil.copy(kimi_folder / "tiktoken.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens["<|im_end|>"] == 163586
    assert tokenizer.special_tokens["<|tool_call_argument_begin|>"] == 163598
    assert tokenizer.special_tokens["[PAD]"] == 163839
    assert "<think>" not in tokenizer.special_tokens
    assert tokenizer.special_tokens["<|tool_calls_section_begin|>"] not in tokenizer.hidden_ids


def plain_bpe(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Merge the adjacent pair of lowest rank until there is none."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        if not pairs or min(pairs)[0] == 1 << 30:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="session")
def ranks(kimi_folder: Path) -> dict[bytes, int]:
    return read_ranks(kimi_folder / "tiktoken.model")


@given(text=st.text(st.characters(codec="utf-8"), max_size=60) | st.text("aB 1'sé中の\n\t\r!<|", max_size=60))
@settings(max_examples=examples(150), deadline=None)
def test_ids_equal_a_plain_bpe_loop_over_another_regex_engine(
    kimi: Tokenizer, ranks: dict[bytes, int], text: str
) -> None:
    pieces = regex.findall("(?V1)" + SPLIT_PATTERN, text)
    expected = [token for piece in pieces for token in plain_bpe(piece.encode(), ranks)]
    assert kimi.encode(text) == expected
    assert kimi.decode(expected) == text


@given(parts=st.lists(st.tuples(st.sampled_from("ax \n\u3000"), st.integers(1, 60_000)), max_size=12))
@settings(max_examples=examples(40), deadline=None)
def test_long_texts_are_cut_as_moonshot_cuts_them(parts: list[tuple[str, int]]) -> None:
    """No piece over 400,000 characters, no run over 25,000, and every cut as late as it may be."""
    text = "".join(character * count for character, count in parts)
    pieces = list(_cut(text))
    assert "".join(pieces) == text
    at = 0
    for piece in pieces:
        runs = regex.findall(r"\s+|\S+", piece)
        assert max(map(len, runs)) <= 25_000
        assert len(piece) <= 400_000
        at += len(piece)
        if at < len(text):
            ends_block = at % 400_000 == 0
            assert ends_block or (len(runs[-1]) == 25_000 and text[at].isspace() == piece[-1].isspace())


def test_lone_surrogates_are_encoded_like_tiktoken_does(kimi: Tokenizer) -> None:
    assert kimi.decode(kimi.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("token", [163840, -1, 1 << 70])
def test_ids_outside_the_vocabulary_are_errors(kimi: Tokenizer, token: int) -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary of 163840"):
        kimi.decode([token])


GOOD = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*GOOD[:5], "!!! 5", *GOOD[6:]], "line 6"),
        ([*GOOD[:5], GOOD[5].split()[0], *GOOD[6:]], "line 6"),
        ([*GOOD[:5], GOOD[5].split()[0] + " 7", *GOOD[6:]], "line 6.*rank 5"),
        ([*GOOD[:5], GOOD[4].split()[0] + " 5", *GOOD[6:]], "line 6"),
        ([*GOOD[:5], " 5", *GOOD[6:]], "line 6"),
        (GOOD[:200], "byte 200 has no token"),
        ([], "byte 0 has no token"),
    ],
)
def test_a_damaged_vocabulary_names_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "can't be read as JSON"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "must map ids"),
        ('{"added_tokens_decoder": {"300": {}}}', "must map ids"),
        ('{"added_tokens_decoder": {"300": {"content": ""}}}', "without text"),
        ('{"added_tokens_decoder": {"300": {"content": "a\\ud800"}}}', "half a character"),
        ('{"added_tokens_decoder": {"600": {"content": "a"}}}', "id 600, expected 256 to 511"),
        ('{"added_tokens_decoder": {"300": {"content": "a"}, "301": {"content": "a"}}}', "same text"),
    ],
)
def test_a_damaged_tokenizer_config_is_named(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "tiktoken.model").write_text("\n".join(GOOD))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_raises_only_when_text_is_wanted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_turn_ids == frozenset()
    for use in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1]), lambda: tokenizer.render([])):
        with pytest.raises(TokenizerError, match=r"neither tiktoken\.model nor tokenizer\.json"):
            use()
