"""Streaming: whole characters, stop strings across tokens, and the same text as decoding at once."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from k2lite.text.stream import TextStream
from k2lite.text.tokenizer import Tokenizer
from tests.samples import examples

text_bytes = st.lists(st.sampled_from(["a", "b", "ab", "é", "中", "🙂", "\xff", "<"]), max_size=14).map("".join)
ids = st.lists(st.integers(0, 511), max_size=40) | text_bytes.map(lambda text: list(text.encode("utf-8")))


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reading character by character, the text before the stop string that is completed first."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(ids=ids)
@settings(max_examples=examples(300), deadline=None)
def test_pieces_together_are_the_decoded_text(byte_tokenizer: Tokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        stream = TextStream(byte_tokenizer, skip_special=skip)
        pieces = [stream.feed(token) for token in ids]
        assert "".join(pieces) + stream.flush() == byte_tokenizer.decode(ids, skip_special=skip)


@given(text=text_bytes, cut=st.integers(0, 30))
@settings(max_examples=examples(200), deadline=None)
def test_no_half_character_is_ever_emitted(byte_tokenizer: Tokenizer, text: str, cut: int) -> None:
    stream = TextStream(byte_tokenizer)
    emitted = "".join(stream.feed(byte) for byte in text.encode()[:cut])
    assert text.startswith(emitted)


@given(ids=ids, stops=st.lists(st.sampled_from(["ab", "b", "aba", "aab", "é中", "🙂", "", "a\ufffd"]), max_size=3))
@settings(max_examples=examples(400), deadline=None)
def test_stop_strings_cut_the_text_wherever_tokens_end(
    byte_tokenizer: Tokenizer, ids: list[int], stops: list[str]
) -> None:
    stream = TextStream(byte_tokenizer, stop=tuple(stops))
    text = "".join(stream.feed(token) for token in ids) + stream.flush()
    assert (text, stream.stopped) == cut_at_stop(byte_tokenizer.decode(ids, skip_special=True), stops)


def test_text_is_not_held_back_longer_than_needed(byte_tokenizer: Tokenizer) -> None:
    stream = TextStream(byte_tokenizer, stop=("END",))
    assert [stream.feed(ord(c)) for c in "aENb"] == ["a", "", "", "ENb"]


def test_nothing_follows_a_stop(byte_tokenizer: Tokenizer) -> None:
    stream = TextStream(byte_tokenizer, stop=("x",))
    assert [stream.feed(ord(c)) for c in "axb"] == ["a", "", ""]
    assert (stream.flush(), stream.stopped) == ("", "x")


def test_tool_tokens_are_shown_and_role_tokens_are_not(byte_tokenizer: Tokenizer) -> None:
    ids = [byte_tokenizer.special_tokens[name] for name in ("<|im_user|>", "<|tool_call_begin|>")]
    assert byte_tokenizer.decode(ids, skip_special=True) == "<|tool_call_begin|>"
