"""Answers read by token id: thoughts, words and calls, and every deviation on file (formats.md 7.6)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from k2lite.text.answer_reader import AnswerReader, CallArguments, CallBegin, Event, Reasoning, Text
from k2lite.text.byte_tokenizer import N_BYTES, write_byte_tokenizer
from k2lite.text.tokenizer import Tokenizer, load_tokenizer

TOOLS = {"get_weather": {"properties": {"city": {}}}, "exec": {"properties": {"command": {}, "cwd": {}}}}
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
Told = tuple[str, str, list[tuple[str, str, Any]]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("thinking")
    write_byte_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for slot, name in ((22, "<think>"), (23, "</think>")):
        config["added_tokens_decoder"][str(N_BYTES + slot)] = {"content": name, "special": False}
    path.write_text(json.dumps(config))
    return load_tokenizer(folder)


def told(events: Sequence[Event]) -> Told:
    """Thoughts, words, and calls with parsed arguments."""
    thought = "".join(event.text for event in events if isinstance(event, Reasoning))
    said = "".join(event.text for event in events if isinstance(event, Text))
    calls = [event for event in events if isinstance(event, CallBegin)]
    given = {call.index: "" for call in calls}
    for event in events:
        if isinstance(event, CallArguments):
            given[event.index] += event.text
    return thought, said, [(call.id, call.name, json.loads(given[call.index])) for call in calls]


def read(tokenizer: Tokenizer, text: str, *, thinks: bool = False, first_call: int = 0) -> Told:
    reader = AnswerReader(tokenizer, thinks=thinks, tools=TOOLS, first_call=first_call)
    events = [event for token in tokenizer.encode(text, allow_special=True) for event in reader.feed(token)]
    return told([*events, *reader.flush()])


WEATHER = ("functions.get_weather:0", "get_weather", {"city": "Köln"})
ONE = f'{CALL}functions.get_weather:0{ARGS}{{"city": "Köln"}}{CALL_END}'


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [
        ("hello", False, ("", "hello", [])),
        ("hm</think>hello", True, ("hm", "hello", [])),
        ("<think>hm</think>hello", False, ("hm", "hello", [])),
        (f"I look.{SECTION}{ONE}{SECTION_END}", False, ("", "I look.", [WEATHER])),
        # the section opens inside the reasoning
        (f"hm{SECTION}{ONE}{SECTION_END}", True, ("hm", "", [WEATHER])),
        # marks of thinking in the wrong place
        ("<think>hm<think>m</think>a</think>b", False, ("hmm", "ab", [])),
        # a call without its section, an end that is missing
        (f"x{ONE}", False, ("", "x", [WEATHER])),
        (f'{SECTION}{CALL}functions.get_weather:0{ARGS}{{"city": "Köln"}}{SECTION_END}', False, ("", "", [WEATHER])),
        (f'{SECTION}{CALL}functions.get_weather:0{ARGS}{{"city": "Köln"}}', False, ("", "", [WEATHER])),
        # ids of other forms
        (f'{SECTION}{CALL}3{ARGS}{{"city": "Köln"}}{CALL_END}', False, ("", "", [WEATHER])),
        (f'{SECTION}{CALL}get_weather:7{ARGS}{{"city": "Köln"}}{CALL_END}', False, ("", "", [WEATHER])),
        (f'{SECTION}{CALL}functions_get_weather_0{ARGS}{{"city": "Köln"}}{CALL_END}', False, ("", "", [WEATHER])),
        (
            f'{SECTION}{CALL}functionsexec5{ARGS}{{"command": "ls"}}{CALL_END}',
            False,
            ("", "", [("functions.exec:0", "exec", {"command": "ls"})]),
        ),
        # two begins without arguments between: the first is none
        (f"{SECTION}{CALL}functions.exec:0{ONE}{SECTION_END}", False, ("", "", [WEATHER])),
        # text after the section, white space before it
        (f" \n{SECTION}{ONE}{SECTION_END}Done?", False, ("", "", [WEATHER])),
        # no arguments
        (
            f"{SECTION}{CALL}functions.exec:0{ARGS}{CALL_END}",
            False,
            ("", "", [("functions.exec:0", "exec", {})]),
        ),
        # control tokens that belong nowhere
        ("a<|im_user|>b[EOT]c", False, ("", "abc", [])),
    ],
)
def test_answers_and_their_deviations(tokenizer: Tokenizer, text: str, thinks: bool, expected: Told) -> None:
    assert read(tokenizer, text, thinks=thinks) == expected


def test_calls_are_numbered_over_the_conversation(tokenizer: Tokenizer) -> None:
    _, _, calls = read(tokenizer, f"{SECTION}{ONE}{ONE}{SECTION_END}", first_call=4)
    assert [call[0] for call in calls] == ["functions.get_weather:4", "functions.get_weather:5"]


def test_text_that_looks_like_a_call_is_text(tokenizer: Tokenizer) -> None:
    reader = AnswerReader(tokenizer, tools=TOOLS)
    events = [event for token in tokenizer.encode(SECTION + ONE) for event in reader.feed(token)]
    assert told([*events, *reader.flush()]) == ("", SECTION + ONE, [])
