"""Two greedy answers through the model's own chat template: a question whose answer is known, and a call of a tool.

Judges validity only: whether the number is there, whether the call names the tool and its arguments satisfy the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from k2lite.benchmark import Phase, phase, snapshot
from k2lite.engine import Chunk, Engine
from k2lite.quant.errors import ContextLengthError
from k2lite.text.reasoning import BEGIN, END
from k2lite.text.tokenizer import Prompt
from k2lite.text.tool_calls import tool_calls

QUESTION, RESULT = "How many centimeters are 12 meters?", "1200"
REQUEST = "Please send a letter with city Torino and count 3."
ARGUMENTS: dict[str, type] = {"city": str, "count": int}
TOOL = {
    "type": "function",
    "function": {
        "name": "send_letter",
        "description": "Send a letter.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["city", "count"],
        },
    },
}

Tools = Sequence[Mapping[str, Any]] | None
Judgement = Literal["right", "wrong", "unfinished"]


@dataclass(frozen=True)
class GreedyAnswer:
    """`judgement` is "unfinished" where the answer had no room to end."""

    asked: str
    text: str
    tokens: int
    judgement: Judgement
    said: str
    prefill: Phase
    decode: Phase


def greedy_answers(engine: Engine, most_tokens: int) -> list[GreedyAnswer]:
    """Both answers, of `most_tokens` at most; none if the folder has no chat template."""
    return [_answer(engine, *question, most_tokens) for question in _questions(engine)]


def demand_room(engine: Engine, most_tokens: int) -> None:
    """Raise ContextLengthError where an answer of `most_tokens` has no room."""
    room = engine.placement.context_tokens
    for question in _questions(engine):
        needed = len(_prompt(engine, *question).ids) + most_tokens
        if needed > room:
            raise ContextLengthError(f"a question and its answer take {needed} tokens, and the context holds {room}")


def _questions(engine: Engine) -> list[tuple[str, Tools]]:
    return [] if engine.tokenizer.template is None else [(QUESTION, None), (REQUEST, [TOOL])]


def _prompt(engine: Engine, asked: str, tools: Tools) -> Prompt:
    return engine.tokenizer.render([{"role": "user", "content": asked}], tools, thinking=False)


def _answer(engine: Engine, asked: str, tools: Tools, most: int) -> GreedyAnswer:
    prompt = _prompt(engine, asked, tools)
    tokens: list[int] = []
    with engine.open(len(prompt.ids) + most) as sequence:
        before = snapshot(engine)
        logits = engine.prefill(sequence, prompt.ids)
        prefill = phase(engine, before, len(prompt.ids))
        before = snapshot(engine)
        while len(tokens) < most and int(logits.argmax()) not in engine.stop_ids:
            tokens.append(int(logits.argmax()))
            logits = engine.step([Chunk(sequence, tokens[-1:])])[0][0]
        decode = phase(engine, before, len(tokens))
    answer = engine.tokenizer.decode(tokens)
    judgement, said = judge_call(answer) if tools else judge_number(answer)
    if judgement == "wrong" and len(tokens) == most:
        judgement, said = "unfinished", f"it had not ended after {most} tokens: {said}"
    return GreedyAnswer(asked, answer, len(tokens), judgement, said, prefill, decode)


def judge_number(answer: str) -> tuple[Judgement, str]:
    said = answer.partition(END)[2] if BEGIN in answer and END in answer else answer
    found = re.search(rf"(?<!\d){RESULT}(?!\d)", said.replace(",", ""))
    return ("right", f"holds {RESULT}") if found else ("wrong", f"no {RESULT} in it")


def judge_call(answer: str) -> tuple[Judgement, str]:
    calls = tool_calls(answer)
    if not calls:
        return "wrong", "no complete call in it"
    for call in calls:
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            return "wrong", f"the arguments of {call.id} are no JSON"
        if call.name != "send_letter" or not isinstance(arguments, dict):
            return "wrong", f"{call.id} with {call.arguments} is no call of the tool"
        kinds = {name: type(value) for name, value in arguments.items()}
        if kinds != ARGUMENTS:
            return "wrong", f"the arguments {call.arguments} don't satisfy the tool's schema"
    return "right", f"{calls[0].id} with {calls[0].arguments}"
