"""The dialogue generator: answers that are right, calls that satisfy their schemas, held-out parts kept apart."""

from __future__ import annotations

import calendar
import json
import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from k2lite.text.tokenizer import Tokenizer
from tools.demo_training.batches import PROMPT_WEIGHT, Batches, said_by_assistant
from tools.demo_training.questions import KINDS, question
from tools.demo_training.tools_data import NO_TOOL, ToolDialogue, tool_dialogue

KINDS_OF_USE = ("single", "parallel", "chain", "none")
TYPES: dict[str, type] = {"string": str, "integer": int, "boolean": bool}


def dialogues(kind: str, *, held_out: bool, count: int = 150) -> list[ToolDialogue]:
    rng = random.Random(f"{kind}{held_out}")
    return [tool_dialogue(rng, held_out=held_out, kind=kind) for _ in range(count)]


def calls_of(made: ToolDialogue) -> list[dict[str, Any]]:
    return [call for message in made.messages for call in message.get("tool_calls", [])]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_USE)
def test_calls_name_an_offered_tool_with_arguments_of_its_schema(kind: str, held_out: bool) -> None:
    for made in dialogues(kind, held_out=held_out):
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in made.tools}
        assert len(schemas) == len(made.tools) <= 4
        calls = calls_of(made)
        assert len(calls) in {"single": (1,), "parallel": (2,), "chain": (1, 2), "none": (0,)}[kind]
        for number, call in enumerate(calls):
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert call["id"] == f"functions.{name}:{number}"
            schema = schemas[name]
            assert set(arguments) == set(schema["required"]) == set(schema["properties"])
            for key, value in arguments.items():
                assert type(value) is TYPES[schema["properties"][key]["type"]]
                assert value in schema["properties"][key].get("enum", [value])


@pytest.mark.parametrize("kind", ["single", "parallel", "chain"])
def test_every_argument_can_be_read_and_the_answer_is_the_last_result(kind: str) -> None:
    for made in dialogues(kind, held_out=False):
        read = ""
        for message in made.messages:
            for call in message.get("tool_calls", []):
                for value in json.loads(call["function"]["arguments"]).values():
                    said = json.dumps(value) if isinstance(value, bool) else str(value)
                    assert re.search(rf"\b{said}\b", read), (said, read)
            read += f" {message['content']}"
        results = [json.loads(message["content"]) for message in made.messages if message["role"] == "tool"]
        for field, value in (results if kind == "parallel" else results[-1:])[-1].items():
            assert f"{field} is {value}" in made.messages[-1]["content"]


def test_where_no_tool_fits_the_request_names_none_of_them() -> None:
    for made in dialogues("none", held_out=False):
        request = made.messages[0]["content"].lower()
        for tool in made.tools:
            verb, noun = tool["function"]["name"].split("_")
            assert f"{verb} a {noun} " not in request
            assert f"{verb} a {noun}:" not in request
        assert made.messages[-1]["content"] == NO_TOOL


def test_held_out_tools_and_names_are_never_trained_on() -> None:
    def parts(held_out: bool) -> tuple[set[str], set[str]]:
        tools: set[str] = set()
        values: set[str] = set()
        for kind in KINDS_OF_USE:
            for made in dialogues(kind, held_out=held_out, count=400):
                tools |= {tool["function"]["name"] for tool in made.tools}
                for call in calls_of(made):
                    values |= {v for v in json.loads(call["function"]["arguments"]).values() if isinstance(v, str)}
        return tools, {value for value in values if value[0].isupper()}

    (trained_tools, trained_values), (tools, values) = parts(False), parts(True)
    assert len(trained_tools) > 1000
    assert len(tools) > 300
    assert not tools & trained_tools
    assert not values & trained_values


@pytest.mark.parametrize("kind", ["arithmetic", "look-up", "sorting", "dates", "units"])
def test_held_out_questions_are_never_trained_on(kind: str) -> None:
    rng = random.Random(0)
    trained = {comparable(question(rng, held_out=False, kind=kind).question) for _ in range(3000)}
    assert not trained & {comparable(question(rng, held_out=True, kind=kind).question) for _ in range(300)}


def comparable(text: str) -> str:
    """A sum asked in other words is the same question."""
    found = re.search(r"(\d+) (plus|minus|\+|-) (\d+)", text)
    return f"{found[1]} {found[2] in ('plus', '+')} {found[3]}" if found else text


def column_by_column(a: int, sign: str, b: int) -> str:
    """The working of a sum or difference of two numbers below 100, in plain school arithmetic."""
    ones_a, ones_b, tens_a, tens_b = a % 10, b % 10, a // 10, b // 10
    if sign == "+":
        ones = ones_a + ones_b
        carried = " + 1" if ones > 9 else ""
        return f"{ones_a} + {ones_b} = {ones}, {tens_a} + {tens_b}{carried} = {(a + b - ones % 10) // 10}, so {a + b}."
    if ones_a < ones_b:
        ones_a, tens_a = ones_a + 10, tens_a - 1
    return f"{ones_a} - {ones_b} = {ones_a - ones_b}, {tens_a} - {tens_b} = {tens_a - tens_b}, so {a - b}."


def right_answer(kind: str, text: str) -> str:
    """Worked out from the question's text alone."""
    if kind == "arithmetic":
        found = re.search(r"(\d+) (plus|minus|\+|-) (\d+)", text)
        assert found is not None
        return column_by_column(int(found[1]), {"plus": "+", "minus": "-"}.get(found[2], found[2]), int(found[3]))
    if kind == "look-up":
        facts = {name: (count, thing) for name, count, thing in re.findall(r"(\w+) has (\d+) (\w+)\.", text)}
        asked = re.search(r"(?:How many (\w+)|What) does (\w+) have\?$", text)
        assert asked is not None
        count, thing = facts[asked[2]]
        assert asked[1] in (None, thing)
        return f"{asked[2]} has {count} {thing}."
    if kind == "sorting":
        return ", ".join(map(str, sorted(map(int, re.findall(r"\d+", text)))))
    if kind == "dates":
        steps, unit, name = re.findall(r"comes (\d+) (day|month)s? after (\w+)", text)[0]
        names = list(calendar.day_name) if unit == "day" else list(calendar.month_name)[1:]
        after = names[names.index(name) + 1 :] + names
        return ", ".join(f"{step} {after[step - 1]}" for step in range(1, int(steps) + 1)) + "."
    small, count, large = re.findall(r"How many (\w+) are (\d+) (\w+)", text)[0]
    in_seconds_years_meters_dollars_grams = {"milliseconds": 0.001, "decades": 10, "centuries": 100, "cents": 0.01,
        "millimeters": 0.001, "centimeters": 0.01, "kilometers": 1000, "kilograms": 1000}  # fmt: skip
    factor = in_seconds_years_meters_dollars_grams.get
    return f"{round(int(count) * factor(large, 1) / factor(small, 1))} {small}."


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "greeting"])
def test_the_answers_are_right(kind: str) -> None:
    rng = random.Random(1)
    for at in range(400):
        asked = question(rng, held_out=at % 2 == 0, kind=kind)
        assert asked.answer == right_answer(kind, asked.question), asked


def test_what_the_assistant_says_is_marked_up_to_its_end_of_turn(tokenizer: Tokenizer) -> None:
    made = dialogues("chain", held_out=False, count=1)[0]
    ids = tokenizer.render(made.messages, made.tools, add_generation_prompt=False).ids
    said = said_by_assistant(ids, tokenizer.special_tokens)
    turns = tokenizer.decode(token for token, own in zip(ids, said, strict=True) if own).split("<|im_end|>")
    assert turns[-1] == ""
    assert [turn.startswith("<|tool_calls_section_begin|>") for turn in turns[:-1]] == [
        "tool_calls" in message for message in made.messages if message["role"] == "assistant"
    ]
    assert turns[-2] == made.messages[-1]["content"]


def test_a_steps_batch_depends_on_seed_and_step_alone_and_is_packed_by_document(tokenizer: Tokenizer) -> None:
    text = np.arange(20_000, dtype=np.uint16) % 250
    first, again = (Batches(tokenizer, text, seed=5, tokens=4096) for _ in range(2))
    again.batch(0)
    batch = first.batch(1)
    assert torch.equal(batch.ids, again.batch(1).ids)
    assert not torch.equal(batch.ids, first.batch(2).ids)
    assert not torch.equal(batch.ids, Batches(tokenizer, text, seed=6, tokens=4096).batch(1).ids)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert first.batch(3).ids.shape == (4, 1024)
    # positions begin anew with a document, and nothing is learned across the border
    border = batch.documents[:, 1:] != batch.documents[:, :-1]
    assert border.any()
    assert (batch.positions[:, 1:][border] == 0).all()
    assert (batch.weights[:, :-1][border] == 0).all()
    assert {round(float(weight), 3) for weight in batch.weights.unique()} <= {0.0, PROMPT_WEIGHT, 1.0}


def test_the_windows_of_text_are_those_in_the_batch(tokenizer: Tokenizer) -> None:
    text = np.random.default_rng(0).integers(0, 250, 20_000).astype(np.uint16)
    batches = Batches(tokenizer, text, seed=5, tokens=4096)
    for step in (0, 3):
        windows = batches.text_windows(step)
        ids = batches.batch(step).ids
        assert len(windows) >= 1
        for row, window in enumerate(windows):
            assert window[:-1].tolist() == ids[row].tolist()
