"""Tool-use dialogues in Kimi-K2's own format: schemas made from parts, calls with copied values, results read back.

Kinds: one call, two calls at once, two calls in turn (the second uses the first one's result), no tool that fits.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from . import words

Message = dict[str, Any]
Value = str | int | bool
NO_TOOL = "None of the tools can do that."


@dataclass(frozen=True)
class Tool:
    """A function: verb and noun give its name, `parameters` maps names to JSON schemas."""

    verb: str
    noun: str
    parameters: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.noun}"

    @property
    def schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": self.parameters, "required": list(self.parameters)}
        description = f"{self.verb.capitalize()} a {self.noun}."
        return {
            "type": "function",
            "function": {"name": self.name, "description": description, "parameters": parameters},
        }


@dataclass(frozen=True)
class ToolDialogue:
    """`messages` end with the final answer; `tools` are what is offered."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]]


def tool_dialogue(
    rng: random.Random, *, held_out: bool, kind: str | None = None, offered: int | None = None
) -> ToolDialogue:
    kind = kind or rng.choices(("single", "parallel", "chain", "none"), (60, 12, 12, 16))[0]
    tools = _tools(rng, offered or rng.randint(1, 4), held_out)
    make = {"single": _single, "parallel": _parallel, "chain": _chain, "none": _none}[kind]
    messages = make(rng, tools, held_out)
    shuffled = tools[:]
    rng.shuffle(shuffled)
    return ToolDialogue(kind, messages, [tool.schema for tool in shuffled])


def _tools(rng: random.Random, count: int, held_out: bool) -> list[Tool]:
    """Different tools; often one shares its verb or its noun with the first, so that a name must be read whole."""
    pairs = [words.verb_noun(rng, held_out=held_out)]
    while len(pairs) < count:
        verb, noun = words.verb_noun(rng, held_out=held_out)
        near = rng.random()
        candidate = (pairs[0][0], noun) if near < 0.2 else (verb, pairs[0][1]) if near < 0.4 else (verb, noun)
        split = words.is_held_out(f"tool:{candidate[0]}_{candidate[1]}", 0.1)
        if split == held_out and candidate not in pairs:
            pairs.append(candidate)
    return [Tool(verb, noun, _parameters(rng)) for verb, noun in pairs]


def _parameters(rng: random.Random) -> dict[str, dict[str, Any]]:
    chosen: dict[str, dict[str, Any]] = {}
    for _ in range(rng.choices((1, 2, 3), (45, 40, 15))[0]):
        kind = rng.choices(("string", "integer", "enum", "boolean"), (45, 30, 15, 10))[0]
        if kind == "string":
            chosen[rng.choice(words.STRING_PARAMETERS)] = {"type": "string"}
        elif kind == "integer":
            chosen[rng.choice(words.INTEGER_PARAMETERS)] = {"type": "integer"}
        elif kind == "boolean":
            chosen[rng.choice(words.BOOLEAN_PARAMETERS)] = {"type": "boolean"}
        else:
            name = rng.choice(list(words.ENUM_PARAMETERS))
            chosen[name] = {"type": "string", "enum": rng.sample(words.ENUM_PARAMETERS[name], 3)}
    return chosen


def _arguments(rng: random.Random, tool: Tool, held_out: bool) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, schema in tool.parameters.items():
        if "enum" in schema:
            values[name] = rng.choice(schema["enum"])
        elif schema["type"] == "integer":
            values[name] = rng.randint(1, 999)
        elif schema["type"] == "boolean":
            values[name] = rng.random() < 0.5
        else:
            values[name] = words.word(rng, held_out=held_out)
    return values


def _say(value: Value) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _phrase(arguments: dict[str, Value]) -> str:
    return " and ".join(f"{name} {_say(value)}" for name, value in arguments.items())


def _request(rng: random.Random, tool: Tool, arguments: dict[str, Value]) -> str:
    form = rng.choice(
        (
            "{verb} a {noun} with {phrase}.",
            "Please {verb} a {noun} with {phrase}.",
            "Can you {verb} a {noun} with {phrase}?",
            "I want you to {verb} a {noun}: {phrase}.",
        )
    )
    text: str = form.format(verb=tool.verb, noun=tool.noun, phrase=_phrase(arguments))
    return text[0].upper() + text[1:]


def _calls(first: int, *calls: tuple[Tool, dict[str, Value]]) -> Message:
    entries = [
        {
            "id": f"functions.{tool.name}:{first + place}",
            "type": "function",
            "function": {"name": tool.name, "arguments": json.dumps(arguments)},
        }
        for place, (tool, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": entries}


def _result(rng: random.Random, tool: Tool, number: int, held_out: bool) -> tuple[Message, str, Value]:
    """A tool's answer: the message, the field and its value."""
    field = rng.choice(words.RESULT_FIELDS)
    value: Value = rng.randint(1, 999) if rng.random() < 0.6 else words.word(rng, held_out=held_out)
    message = {
        "role": "tool",
        "tool_call_id": f"functions.{tool.name}:{number}",
        "name": tool.name,
        "content": json.dumps({field: value}),
    }
    return message, field, value


def _single(rng: random.Random, tools: list[Tool], held_out: bool) -> list[Message]:
    tool = tools[0]
    arguments = _arguments(rng, tool, held_out)
    result, field, value = _result(rng, tool, 0, held_out)
    return [
        {"role": "user", "content": _request(rng, tool, arguments)},
        _calls(0, (tool, arguments)),
        result,
        {"role": "assistant", "content": f"Done. The {field} is {value}."},
    ]


def _parallel(rng: random.Random, tools: list[Tool], held_out: bool) -> list[Message]:
    tool = tools[0]
    first, second = _arguments(rng, tool, held_out), _arguments(rng, tool, held_out)
    question = f"{_request(rng, tool, first)[:-1]}, and another with {_phrase(second)}."
    result1, field1, value1 = _result(rng, tool, 0, held_out)
    result2, field2, value2 = _result(rng, tool, 1, held_out)
    return [
        {"role": "user", "content": question},
        _calls(0, (tool, first), (tool, second)),
        result1,
        result2,
        {"role": "assistant", "content": f"Done. The {field1} is {value1}, and the {field2} is {value2}."},
    ]


def _chain(rng: random.Random, tools: list[Tool], held_out: bool) -> list[Message]:
    """The second call's only string or integer argument is the first result."""
    one = tools[0]
    two = tools[1] if len(tools) > 1 else Tool(*words.verb_noun(rng, held_out=held_out), {})
    if two.name == one.name:
        return _single(rng, tools, held_out)
    arguments = _arguments(rng, one, held_out)
    result1, field, value = _result(rng, one, 0, held_out)
    name = rng.choice(words.STRING_PARAMETERS if isinstance(value, str) else words.INTEGER_PARAMETERS)
    two = Tool(two.verb, two.noun, {name: {"type": "string" if isinstance(value, str) else "integer"}})
    tools[1:2] = [two]
    result2, field2, value2 = _result(rng, two, 1, held_out)
    question = f"{_request(rng, one, arguments)} Then {two.verb} a {two.noun} with the {field} as {name}."
    return [
        {"role": "user", "content": question},
        _calls(0, (one, arguments)),
        result1,
        _calls(1, (two, {name: value})),
        result2,
        {"role": "assistant", "content": f"Done. The {field2} is {value2}."},
    ]


def _none(rng: random.Random, tools: list[Tool], held_out: bool) -> list[Message]:
    names = {tool.name for tool in tools}
    while True:
        verb, noun = words.verb_noun(rng, held_out=held_out)
        if f"{verb}_{noun}" not in names:
            break
    other = Tool(verb, noun, _parameters(rng))
    question = _request(rng, other, _arguments(rng, other, held_out))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": NO_TOOL}]
