"""Turns of a chat without a terminal: what is kept of an answer, and what ends one."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import k2lite
from k2lite.engine import Engine
from k2lite.sampling import SamplingParams, Token
from k2lite.session import Session
from k2lite.text.byte_tokenizer import N_BYTES
from k2lite.verbs import chat

Sampler = Callable[[torch.Tensor, SamplingParams, int], Token]
ARGUMENTS = argparse.Namespace(max_tokens=40, stop=[])


def writes(text: bytes, *then: int, interrupt: int | None = None) -> Sampler:
    """A sampler that writes this text and these ids whatever the model says; Ctrl-C comes at one of them."""
    ids = iter([*text, *then])
    made = 0

    def sample(logits: torch.Tensor, params: SamplingParams, position: int) -> Token:  # noqa: ARG001
        nonlocal made
        made += 1
        if made == interrupt:
            raise KeyboardInterrupt
        return Token(next(ids), logprob=0.0)

    return sample


@pytest.fixture(scope="module")
def engine(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The demo with K2.6's names for <think> and </think>, and no ids of the end but the tokenizer's."""
    folder = tmp_path_factory.mktemp("turns") / "model"
    shutil.copytree(demo, folder)
    for name, key in (("config.json", "eos_token_id"), ("generation_config.json", "eos_token_id")):
        values = json.loads((folder / name).read_text())
        values.pop(key)
        (folder / name).write_text(json.dumps(values))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for slot, name in ((22, "<think>"), (23, "</think>")):
        config["added_tokens_decoder"][str(N_BYTES + slot)] = {"content": name, "special": False}
    path.write_text(json.dumps(config))
    return k2lite.load(folder, context=256)


def turn(engine: Engine, monkeypatch: pytest.MonkeyPatch, sampler: Sampler) -> list[dict[str, Any]]:
    monkeypatch.setattr("k2lite.engine.sample", sampler)
    messages: list[dict[str, Any]] = []
    chat._turn(Session(engine), messages, "Hi", SamplingParams(), ARGUMENTS)
    return messages


@pytest.mark.parametrize("end", ["[EOS]", "<|im_end|>"])
def test_both_end_of_turn_ids_stop_an_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    said = turn(engine, monkeypatch, writes(b"yes", engine.tokenizer.special_tokens[end], ord("x")))
    assert said == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]


def test_thoughts_are_shown_and_kept_apart(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    special = engine.tokenizer.special_tokens
    ids = [special["<think>"], *b"why", special["</think>"], *b"yes", special["[EOS]"]]
    said = turn(engine, monkeypatch, writes(b"", *ids))
    assert said[1] == {"role": "assistant", "content": "yes", "reasoning_content": "why"}
    assert capsys.readouterr().out == "<think>why</think>yes\n"


def test_what_was_said_before_ctrl_c_is_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = turn(engine, monkeypatch, writes("né".encode(), *b"x", interrupt=3))  # within the second character
    assert said[1] == {"role": "assistant", "content": "n"}
    out, err = capsys.readouterr()
    assert (out, err) == ("n\n", " [stopped]")


def test_ctrl_c_before_the_first_token_and_at_the_prompt_does_not_end_the_chat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([KeyboardInterrupt(), "one", "two", EOFError()])

    def read(_: str = "") -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    def turn(_session: Session, messages: list[Any], line: str, *_: Any) -> None:
        heard.append((line, list(messages)))
        raise KeyboardInterrupt

    heard: list[tuple[str, list[Any]]] = []
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "_turn", turn)
    monkeypatch.setattr(chat, "load_engine", lambda *_, **__: engine)
    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    assert chat.execute(parser.parse_args(["model", "--system", ""])) == 0
    system = [{"role": "system", "content": ""}]
    assert heard == [("one", system), ("two", system)]
    assert capsys.readouterr().out == ""
