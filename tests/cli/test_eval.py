"""`k2lite eval` as a user meets it: the table, the JSON object, stdin, and one line for each mistake."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import k2lite
from k2lite.cli import main
from k2lite.demo_checkpoint import write_random_demo
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

from .conftest import Run

TEXT = "The library holds a trillion words.\nÜber den Wolken: 7 × 6 = 42. <|im_end|>\n"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "model"
    write_random_demo(folder, seed=1)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_it_compares_two_folders_and_reads_stdin(k2: Run, demo: Path, other: Path) -> None:
    result = k2("eval", demo, other, "--text", "-", "--window", 24, "--json", input=TEXT)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    n_tokens = len(TEXT.encode())  # one token a byte; a control token's name in a text is text
    assert report["windows"] == math.ceil(n_tokens / 24)
    assert report["scored_tokens"] == n_tokens - report["windows"]
    assert (report["a"], report["b"], report["text"]) == (str(demo), str(other), "-")
    assert report["kl"]["low"] <= report["kl"]["value"] <= report["kl"]["high"]
    assert report["kl"]["value"] > 0.01
    assert report["perplexity_a"]["value"] != report["perplexity_b"]["value"]
    assert 0 <= report["top1_agreement"]["value"] < 1
    assert f"window {report['windows']} of {report['windows']}" in result.stderr
    assert "\r" not in result.stderr  # no bar where there is no terminal
    assert result.stderr.count("; in RAM: trunk") == 2


def test_perplexity_is_that_of_the_engine_s_logits(demo: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(demo), "--text", str(text), "--window", "16", "--max-tokens", "30", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    engine = k2lite.load(demo)
    ids = engine.tokenizer.encode(TEXT)[:30]
    losses = []
    for window in (ids[:16], ids[16:]):
        logits = engine.logits(window).double()
        losses += [float(row.logsumexp(0) - row[token]) for row, token in zip(logits, window[1:], strict=False)]
    assert report["scored_tokens"] == len(losses) == 28
    assert report["perplexity_a"]["value"] == pytest.approx(math.exp(sum(losses) / 28), rel=1e-9)
    assert (report["b"], report["perplexity_b"], report["kl"], report["top1_agreement"]) == (None,) * 4


def test_a_person_gets_a_table(demo: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(demo), str(demo), "--text", str(text), "--max-tokens", "16"]
    assert main([*arguments, "--window", "8"]) == 0
    shown = capsys.readouterr().out
    assert "14 tokens scored in 2 windows of at most 8" in shown
    assert "KL(A||B), nats a token       0.000000   0.000000 to 0.000000" in shown
    assert "top-1 agreement               100.00%   100.00% to 100.00%" in shown
    assert main([*arguments, "--window", "16"]) == 0
    assert "none: one window" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "--text", "{text}"], "not a folder"),
        (["{demo}", "nowhere", "--text", "{text}"], "not a folder"),
        (["{demo}", "--text", "nowhere.txt"], "nowhere.txt: can't be read: No such file"),
        (["{demo}", "--text", "{demo}/model-1-of-4.safetensors"], "is not UTF-8 text"),
        (["{demo}", "--text", "/dev/null"], "the text has 0 tokens"),
        (["{demo}", "--text", "{text}", "--window", "1"], "--window is 1; expected 2 or more"),
        (["{demo}", "--text", "{text}", "--max-tokens", "0"], "--max-tokens is 0; expected 2 or more"),
        (["{demo}", "--text", "{text}", "--context", "100"], "--context is 100 and --window 512"),
        (["{demo}", "--text", "{text}", "--window", "9000"], "9000 tokens asked for; this model takes 1 to 8192"),
        (["{demo}", "{small}", "--text", "{text}"], "A has a vocabulary of 512 and B one of 160"),
        (["{demo}", "{renamed}", "--text", "{text}"], "token 254 is b'\\xfe' in A and b'\\xff' in B"),
        (["{demo}", "--text", "{text}", "--backend", "abacus"], "backend 'abacus' is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    demo: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    places = {"demo": demo, "text": text, "small": tmp_path / "small", "renamed": tmp_path / "renamed"}
    if "{small}" in arguments:
        _write_small(places["small"])
    if "{renamed}" in arguments:
        _write_renamed(demo, places["renamed"])
    assert main(["eval", *(argument.format(**places) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("k2lite eval: ")
    assert expected in last


def _write_small(folder: Path) -> None:
    """A model of another vocabulary, without a tokenizer."""
    write_checkpoint(folder, tiny_config(), random_weights(tiny_config(), seed=0))


def _write_renamed(demo: Path, folder: Path) -> None:
    """The demo whose last two bytes have changed their ids."""
    folder.mkdir()
    for path in demo.iterdir():
        (folder / path.name).symlink_to(path)
    words = [line.split()[0] for line in (demo / "tiktoken.model").read_text().splitlines()]
    words[254:] = words[:253:-1]
    (folder / "tiktoken.model").unlink()
    (folder / "tiktoken.model").write_text("".join(f"{word} {rank}\n" for rank, word in enumerate(words)))
