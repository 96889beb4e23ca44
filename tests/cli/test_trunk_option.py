"""--trunk FORMAT: every verb that loads a model has it, and `plan` counts the bytes that the loaded model has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from k2lite.cli import main
from tests.cli.test_memory_verbs import MACHINE
from tests.quant.quantizing import write_source

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("verb", ["run", "chat", "serve", "plan", "bench", "eval", "trace"])
def test_every_verb_that_loads_has_it(verb: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text").write_text("words")
    write_source(tmp_path / "model", "bf16", num_hidden_layers=2)
    more = {"run": ["-p", "x"], "serve": ["--port", 0], "eval": ["--text", tmp_path / "text"]}
    more["trace"] = [*more["eval"], "--out", tmp_path / "trace"]
    arguments = [verb, tmp_path / "model", "--trunk", "int9", *more.get(verb, [])]
    assert main([str(part) for part in arguments]) == 2
    assert "--trunk: the format 'int9' is unknown" in capsys.readouterr().err


def stored_bytes(folder: Path) -> int:
    """All tensors but routed experts, as the safetensors package reads them."""
    found = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if ".mlp.experts." not in name]  # noqa: SIM118
            found += sum(file.get_tensor(name).nbytes for name in names)
    return found


@pytest.mark.parametrize(
    ("source", "trunk"), [("int4", "int8_g128"), ("bf16", "int8_channel"), ("bf16", "fp8_e4m3_b128"), ("fp8", "bf16")]
)
def test_plan_counts_the_bytes_of_the_folder_that_quantize_writes(
    tmp_path: Path, capsys: Capture, source: str, trunk: str
) -> None:
    folder, machine, written = tmp_path / "model", tmp_path / "desk.json", tmp_path / "written"
    write_source(folder, source, num_hidden_layers=2)
    machine.write_text(json.dumps(MACHINE))
    chosen = ["--experts", "keep", "--trunk", trunk, "--lm-head", "keep"]
    assert main(["quantize", str(folder), str(written), *chosen]) == 0

    def plan(model: Path, *more: str) -> dict[str, object]:
        capsys.readouterr()
        assert main(["plan", str(model), "--machine", str(machine), "--context", "64", "--json", *more]) == 0
        return dict(json.loads(capsys.readouterr().out))

    for model in (folder, folder / "config.json"):
        facts = plan(model, "--trunk", trunk)
        sizes = facts["bytes"]
        assert isinstance(sizes, dict)
        assert sizes["trunk"] == stored_bytes(written)
        assert str(facts["arithmetic"]).endswith(f", trunk to {trunk}")
        assert facts["decode"] == plan(written)["decode"]
    assert "trunk to" not in str(plan(folder)["arithmetic"])


def test_plan_refuses_what_run_refuses(tmp_path: Path, capsys: Capture) -> None:
    write_source(tmp_path / "model", "bf16", num_hidden_layers=2, kv_lora_rank=96)
    (tmp_path / "desk.json").write_text(json.dumps(MACHINE))
    for model in (tmp_path / "model", tmp_path / "model" / "config.json"):
        arguments = ["plan", str(model), "--machine", str(tmp_path / "desk.json"), "--trunk"]
        assert main([*arguments, "int8_g128"]) == 2
        assert "int8_g128 needs rows of a multiple of 128 columns" in capsys.readouterr().err
        assert main([*arguments, "fp8_e4m3_b128", "--backend", "onnx"]) == 2
        assert "onnx can't multiply" in capsys.readouterr().err
