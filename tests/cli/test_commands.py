"""The command line as a user meets it: streams, exit codes, one-line errors, JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import k2lite
from k2lite import cli
from k2lite.errors import TokenizerError
from k2lite.verbs import info
from tests.conftest import REPO

from .conftest import Run


def test_run_streams_the_engine_s_own_tokens(k2_process: Run, demo: Path) -> None:
    result = k2_process("run", demo, "-p", "Hi", "--max-tokens", 12, "--temperature", 0, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    engine = k2lite.load(demo)
    prompt = engine.tokenizer.render([{"role": "user", "content": "Hi"}])
    assert report["prompt_ids"] == prompt.ids
    assert report["ids"] == list(map(int, engine.generate(prompt.ids, max_tokens=12, temperature=0)))
    assert report["finish_reason"] in ("length", "stop")
    assert report["counters"]["prefill_tokens"] == len(prompt.ids)
    assert report["plan"]["backend"] == "cpu"
    assert "backend cpu" in result.stderr
    assert re.search(r"memory and drive allow [\d.e+]+ tok/s", result.stderr)

    plain = k2_process("run", demo, "-p", "Hi", "--max-tokens", 12, "--temperature", 0)
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


def test_info_shows_problems_and_run_refuses_them(k2_process: Run, demo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    info = k2_process("info", broken)
    assert info.returncode == 1
    assert "PROBLEM" in info.stdout
    assert shard.name in info.stdout
    run = k2_process("run", broken, "-p", "x")
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
        (["run", "{demo}", "-p", "x", "--temperature", "0", "--top-p", "0.9"], "--top-p 0.9 has no effect at temperat"),
        (["chat", "{demo}", "--min-p", "0.1", "--temperature", "0"], "--min-p 0.1 has no effect at temperature 0"),
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
    from k2lite.demo_checkpoint import write_random_demo

    write_random_demo(tmp_path / "again")
    ours = {path.name: path.read_bytes() for path in demo.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == ours
    assert list(tmp_path.iterdir()) == [tmp_path / "again"]  # no half-written folder beside it


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "VERB"),
        (["fly"], "'fly'"),
        (["run", "m"], "-p/--prompt"),
        (["run", "m", "-p", "x", "--top-k", "many"], "'many'"),
        (["info", "m", "--quiet"], "--quiet"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-k", "-1"),
        ("--min-p", "2"),
        ("--seed", "-1"),
        ("--max-tokens", "0"),
        ("--stop", ""),
    ],
)
@pytest.mark.parametrize("verb", [["run", "-p", "x"], ["chat"]])
def test_a_value_out_of_range_is_refused_before_the_model_is_looked_at(
    verb: list[str], option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*verb, "nowhere", option, value]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert option.strip("-").replace("-", "_") in err.replace("--stop", "stop")


def fails_with(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def execute(args: argparse.Namespace) -> int:  # noqa: ARG001
        raise error

    return execute


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied", "/m/config.json"), "/m/config.json: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TokenizerError("two\nlines"), "two lines"),
    ],
)
def test_the_machine_s_refusals_are_one_line(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "execute", fails_with(error))
    monkeypatch.setattr(cli, "_drop_stdout", lambda: None)
    assert cli.main(["info", "m"]) == 2
    assert capsys.readouterr().err == f"k2lite info: {expected}\n"


SHELL = {
    "a reader that has gone": ("{k2} info {demo} | (exec true); echo ${{PIPESTATUS[0]}}", "0\n", ""),
    "a full disk": ("{k2} info {demo} > /dev/full; echo $?", "2\n", "k2lite info: No space left on device\n"),
    "no stderr": ("{k2} run nowhere -p x 2>&-; echo $?", "2\n", ""),
    "no stdin": ("{k2} chat nowhere <&- 2>/dev/null; echo $?", "2\n", ""),
}


@pytest.mark.parametrize("case", SHELL)
def test_streams_that_are_closed_or_full(demo: Path, case: str) -> None:
    command, out, err = SHELL[case]
    script = command.format(k2=f"{sys.executable} -m k2lite", demo=demo)
    result = subprocess.run(["bash", "-c", script], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == (out, err)


def test_a_terminal_that_lacks_characters_gets_them_spelled_out(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Modell-\u00fc-\u4e2d"
    folder.symlink_to(demo)
    for arguments, expected in (((), "Modell-\\xfc-\\u4e2d"), (("--json",), None)):
        result = subprocess.run(
            [sys.executable, "-m", "k2lite", "info", folder, *arguments],
            cwd=REPO,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        text = result.stdout.decode("ascii")
        assert (expected in text) if expected else (json.loads(text)["folder"] == str(folder))


def test_a_piped_chat_writes_answers_only(k2_process: Run, demo: Path) -> None:
    """No prompt, no history file: stdout is the answers, one after the other, as `run` would give the first."""
    options = ("--seed", 1, "--max-tokens", 4, "--temperature", 0)
    result = k2_process("chat", demo, *options, input="Hi\n\n/help\n/reset\nHi\n")
    assert result.returncode == 0, result.stderr
    alone = k2_process("run", demo, "-p", "Hi", *options)
    assert result.stdout == 2 * alone.stdout
    assert "> " not in result.stderr


def test_a_folder_without_tokenizer_or_template_can_t_chat_and_says_so_at_once(
    k2: Run, demo: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(demo, bare)
    (bare / "chat_template.jinja").unlink()
    assert "no chat template" in k2("chat", bare, input="").stderr
    assert k2("run", bare, "--raw", "-p", "x", "--max-tokens", 1).returncode == 0
    (bare / "tiktoken.model").unlink()
    result = k2("run", bare, "-p", "x")
    assert (result.returncode, result.stdout) == (2, "")
    assert "found neither tiktoken.model nor tokenizer.json" in result.stderr.splitlines()[-1]
    engine = k2lite.load(bare)
    assert len(list(engine.generate([1, 2], max_tokens=2, stop_ids=frozenset()))) == 2


def test_what_is_off_or_harmless_goes_with_temperature_0(k2: Run, demo: Path) -> None:
    off = ("--top-p", 1, "--top-k", 0, "--min-p", 0, "--seed", 3)
    assert k2("run", demo, "-p", "Hi", "--max-tokens", 1, "--temperature", 0, *off).returncode == 0


def test_a_filter_without_effect_is_refused_where_the_folder_asks_for_temperature_0(
    k2: Run, demo: Path, tmp_path: Path
) -> None:
    shutil.copytree(demo, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0}')
    refused = k2("run", tmp_path / "model", "-p", "Hi", "--max-tokens", 1, "--top-k", 5)
    assert refused.returncode == 2
    assert "--top-k 5 has no effect at temperature 0" in refused.stderr
