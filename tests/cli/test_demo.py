"""The demo model that comes with the package, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from k2lite.demo_folder import DEMO_FOLDER
from k2lite.model_folder import open_model
from tests.conftest import REPO

from .conftest import Run

MOST_BYTES = 28 * 10**6
SHIPPED_AS = {
    "routed experts": {"fp8_e4m3_b128"},
    "shared experts": {"fp8_e4m3_b128"},
    "dense mlp": {"fp8_e4m3_b128"},
    "attention": {"fp8_e4m3_b128"},
    "router": {"bf16", "f32"},
    "norms": {"bf16"},
    "embeddings": {"bf16"},
    "head": {"bf16"},
}


def test_it_is_stored_as_k2_instruct_is_and_small() -> None:
    config, checkpoint = open_model(DEMO_FOLDER)
    assert (config.model_type, config.num_hidden_layers, config.n_routed_experts) == ("kimi_k2", 7, 64)
    assert (checkpoint.problems, checkpoint.notes, config.unknown_keys) == ((), (), ())
    assert {kind: set(uses) for kind, uses in checkpoint.formats().items()} == SHIPPED_AS
    assert len(checkpoint.shards) > 1
    names = {path.name for path in DEMO_FOLDER.iterdir()}
    assert {"generation_config.json", "tiktoken.model", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= MOST_BYTES


def test_demo_copies_it(k2: Run, tmp_path: Path) -> None:
    result = k2("demo", tmp_path / "copy")
    assert (result.returncode, result.stdout) == (0, "")
    assert "trained weights" in result.stderr
    ours, theirs = ({path.name: path.read_bytes() for path in at.iterdir()} for at in (tmp_path / "copy", DEMO_FOLDER))
    assert ours == theirs
    again = k2("demo", tmp_path / "copy")
    assert again.returncode == 2
    seeded = k2("demo", tmp_path / "other", "--seed", 3)
    assert seeded.returncode == 2
    assert "--seed is for --random" in seeded.stderr


def test_random_weights_are_another_small_folder(k2: Run, tmp_path: Path) -> None:
    result = k2("demo", tmp_path / "random", "--random", "--seed", 5)
    assert result.returncode == 0
    assert "random weights" in result.stderr
    assert open_model(tmp_path / "random")[1].problems == ()


def test_without_a_model_it_answers_and_says_so_in_one_line(k2: Run) -> None:
    result = k2("run", "-p", "Hello", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the demo model answers") == 1
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "stop"
    assert answer["text"]
    chat = k2("chat", input="Hello\n")
    assert chat.returncode == 0
    assert "the demo model answers" in chat.stderr
    assert chat.stdout.strip() == answer["text"]


def test_it_calls_a_tool_it_never_saw_and_reads_the_result() -> None:
    result = subprocess.run(
        [sys.executable, "tools/demo_tool_call.py"], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    user, call, returned, answer = result.stdout.splitlines()
    assert user.startswith("user:")
    assert call == 'assistant: calls send_letter with {"city": "Torino", "count": 3}'
    assert returned == 'tool:      functions.send_letter:0 returns {"total": 51}'
    assert "51" in answer
