"""The command line as a user meets it: streams, exit codes, one-line errors, JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import k2lite

from .conftest import Run


def test_run_streams_the_engine_s_own_tokens(k2: Run, demo: Path) -> None:
    result = k2("run", demo, "-p", "Hi", "--max-tokens", 12, "--temperature", 0, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    engine = k2lite.load(demo)
    prompt = engine.tokenizer.render([{"role": "user", "content": "Hi"}])
    assert report["prompt_ids"] == prompt.ids
    assert report["ids"] == list(map(int, engine.generate(prompt.ids, max_tokens=12, temperature=0)))
    assert report["finish_reason"] in ("length", "stop")
    assert report["counters"]["prefill_tokens"] == len(prompt.ids)
    assert report["plan"]["backend"] == "reference"
    assert "backend reference" in result.stderr

    plain = k2("run", demo, "-p", "Hi", "--max-tokens", 12, "--temperature", 0)
    assert plain.stdout == report["text"] + "\n"
    assert "tok/s" in plain.stderr


def test_a_seed_makes_an_answer_repeatable(k2: Run, demo: Path) -> None:
    def text(seed: int) -> str:
        result = k2("run", demo, "-p", "Hi", "--max-tokens", 16, "--temperature", 2, "--seed", seed, "--json")
        return str(json.loads(result.stdout)["ids"])

    assert text(4) == text(4) != text(5)


def test_raw_allows_control_tokens_and_the_template_does_not(k2: Run, demo: Path) -> None:
    control = "<|im_end|>"
    special = k2lite.load(demo).tokenizer.special_tokens[control]
    raw = json.loads(k2("run", demo, "--raw", "-p", f"a{control}", "--max-tokens", 1, "--json").stdout)
    assert raw["prompt_ids"] == [ord("a"), special]
    ours = json.loads(k2("run", demo, "-p", f"a{control}", "--max-tokens", 1, "--json").stdout)
    plain = json.loads(k2("run", demo, "-p", "a", "--max-tokens", 1, "--json").stdout)
    assert ours["prompt_ids"].count(special) == plain["prompt_ids"].count(special)


def test_stop_strings_end_the_text_before_them(k2: Run, demo: Path) -> None:
    whole = json.loads(k2("run", demo, "-p", "Hi", "--max-tokens", 24, "--temperature", 0, "--json").stdout)
    stop = whole["text"][6:9]
    cut = json.loads(
        k2("run", demo, "-p", "Hi", "--max-tokens", 24, "--temperature", 0, "--json", "--stop", stop).stdout
    )
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


def test_info_describes_and_counts(k2: Run, demo: Path) -> None:
    report = json.loads(k2("info", demo, "--json").stdout)
    assert report["problems"] == []
    assert report["config"]["model_type"] == "kimi_k2"
    assert sum(shard["bytes"] for shard in report["shards"]) == sum(
        path.stat().st_size for path in demo.glob("*.safetensors")
    )
    index = json.loads((demo / "model.safetensors.index.json").read_text())
    assert report["trunk_bytes"] + report["experts_bytes"] == index["metadata"]["total_size"]
    text = k2("info", demo)
    assert text.returncode == 0
    for expected in ("kimi_k2, 4 layers (1 dense, 3 MoE)", "fp8_e4m3_b128", "problems    none", "YaRN x 8"):
        assert expected in text.stdout


def test_info_shows_problems_and_run_refuses_them(k2: Run, demo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    info = k2("info", broken)
    assert info.returncode == 1
    assert "PROBLEM" in info.stdout
    assert shard.name in info.stdout
    run = k2("run", broken, "-p", "x")
    assert run.returncode == 2
    assert shard.name in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nowhere", "-p", "x"], "not a folder"),
        (["info", "nowhere"], "not a folder"),
        (["run", "{demo}", "-p", "x", "--backend", "abacus"], "backend 'abacus' is unknown"),
        (["run", "{demo}", "-p", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["run", "{demo}", "-p", "x", "--max-tokens", "100000"], "the context holds"),
        (["run", "{demo}", "-p", "x", "--context", "0"], "context of 0 tokens"),
        (["demo", "{demo}"], "exists already"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(k2: Run, demo: Path, arguments: list[str], expected: str) -> None:
    result = k2(*(argument.format(demo=demo) for argument in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"k2lite {arguments[0]}: ")
    assert expected in last
    assert "Traceback" not in result.stderr


def test_the_demo_checkpoint_is_reproducible_and_whole(demo: Path, tmp_path: Path) -> None:
    from k2lite.demo_checkpoint import write_demo

    write_demo(tmp_path / "again")
    ours = {path.name: path.read_bytes() for path in demo.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == ours
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]  # no half-written folder beside it
