"""The demo folder's writer refuses what it can't write, in one line, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2lite.demo_checkpoint import write_random_demo
from k2lite.errors import RequestError
from k2lite.model_folder import open_model


@pytest.mark.parametrize("name", [".", "..", "/", "full", "file", "empty/.."])
def test_names_that_exist_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "full" / "inside").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match="exists already; name a new folder"):
        write_random_demo(Path(name) if name in (".", "..", "/") else tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_can_t_be_written_is_a_user_s_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"file/model: can't be written: Not a directory"):
        write_random_demo(tmp_path / "file" / "model")
    with pytest.raises(RequestError, match="can't be written: File name too long"):
        write_random_demo(tmp_path / ("n" * 250))


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_random_demo(tmp_path / "model")
    config, checkpoint = open_model(tmp_path / "model")
    assert (checkpoint.problems, checkpoint.notes, config.unknown_keys) == ((), (), ())
    # K2-Instruct's own format, edge blocks included
    assert checkpoint.formats()["routed experts"].keys() == {"fp8_e4m3_b128"}
    assert config.hidden_size % 128
    assert checkpoint.formats()["head"].keys() == {"bf16"}
