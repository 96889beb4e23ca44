"""`k2lite export` and `k2lite quantize FILE.gguf` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2lite.cli import main
from k2lite.model_folder import open_model
from k2lite.quant.gguf_export import EXPORT_TYPES
from k2lite.verbs import export
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

from .conftest import Run


def test_there_and_back(k2: Run, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=128)
    write_checkpoint(tmp_path / "int4", config, random_weights(config, seed=1), format="int4")
    made = k2("export", tmp_path / "int4", tmp_path / "m.gguf", "--type", "q4_0", "--json")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert facts["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert "the cast to F16 changed 0 of 6144 scales" in made.stderr
    assert "the file will hold no tokenizer" in made.stderr
    back = k2("quantize", tmp_path / "m.gguf", tmp_path / "back", "--experts", "keep", "--trunk", "keep")
    assert back.returncode == 0, back.stderr
    assert "q4_0 -> int4_g32" in back.stderr
    assert open_model(tmp_path / "back")[1].problems == ()


def test_parts_and_leftovers(k2: Run, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=128)
    write_checkpoint(tmp_path / "int4", config, random_weights(config, seed=1), format="int4")
    (tmp_path / "m.gguf.partial").write_bytes(b"cut off")
    made = k2("export", tmp_path / "int4", tmp_path / "m.gguf", "--type", "q4_0", "--split-max-size", "60KiB", "--json")
    assert made.returncode == 0, made.stderr
    assert "removed what a run that was cut off has left: m.gguf.partial" in made.stderr
    facts = json.loads(made.stdout)
    assert facts["files"] == sorted(map(str, tmp_path.glob("m*")))
    assert facts["bytes"] == sum(Path(path).stat().st_size for path in facts["files"])
    assert f"{len(facts['files'])} parts of up to" in made.stderr
    back = k2("quantize", facts["file"], tmp_path / "back", "--experts", "keep", "--trunk", "keep")
    assert back.returncode == 0, back.stderr


def test_a_name_that_is_taken_is_said_before_anything_is_removed(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was cut off while it gave its parts their names has left hours of work under the others'."""
    (tmp_path / "m.gguf").write_bytes(b"named")
    (tmp_path / "m-00001-of-00002.gguf.partial").write_bytes(b"whole")
    assert main(["export", str(demo), str(tmp_path / "m.gguf"), "--type", "q8_0"]) == 2
    assert "m.gguf: exists already" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_mistakes_are_one_line(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    for arguments, message in (
        (("export", demo, tmp_path / "out", "--type", "q8_0"), "name a file that ends in .gguf"),
        (("export", demo, tmp_path / "none" / "out.gguf", "--type", "q8_0"), "its folder does not exist"),
        (("export", demo, tmp_path / "out.gguf", "--type", "q8_0", "--split-max-size", 0), "--split-max-size is 0"),
        (("export", demo, tmp_path / "out.gguf", "--type", "q5_k"), "--type: 'q5_k' is unknown"),
        (("export", tmp_path / "bad.gguf", tmp_path / "out.gguf", "--type", "f32"), "makes a folder of it that runs"),
        (("quantize", tmp_path / "bad.gguf", tmp_path / "out"), "bad.gguf: found the file's end"),
    ):
        code, said = main([str(argument) for argument in arguments]), capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), said
        assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_the_help_names_every_type() -> None:
    assert all(name in export.TYPES for name in EXPORT_TYPES)
