"""Index and shards against one another: what is missing, misplaced, doubled or led elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2lite.quant.errors import CheckpointError
from tests.checkpoints import write_checkpoint
from tests.quant.damage import (
    CONFIG,
    EXPERT,
    INDEX,
    WEIGHTS,
    edit_index,
    edit_shard,
    open_folder,
    remove,
    shard_of,
    the_problem,
)


def test_misplaced(folder: Path) -> None:
    name = "lm_head.weight"
    here = shard_of(folder, name)
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path != here)
    edit_index(folder, lambda index: index["weight_map"].update({name: other.name}))
    problem = the_problem(folder)
    assert problem == f"{here}: tensor {name} is misplaced: it lies here, the index says {other.name}"


def test_not_in_the_index(folder: Path) -> None:
    here = shard_of(folder, "lm_head.weight")
    edit_index(folder, lambda index: index["weight_map"].pop("lm_head.weight"))
    assert the_problem(folder) == f"{here}: tensor lm_head.weight lies here and is not in the index"


def test_in_the_index_only(folder: Path) -> None:
    path = shard_of(folder, "lm_head.weight")
    edit_shard(path, lambda tensors: tensors.pop("lm_head.weight"))
    expected = f"{path}: tensor lm_head.weight is missing, the index says that it lies here"
    assert the_problem(folder) == expected


def test_in_two_shards(folder: Path) -> None:
    here = shard_of(folder, "lm_head.weight")
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path != here)
    edit_shard(other, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(160, 160)}))
    problems = open_folder(folder).problems
    assert any("tensor lm_head.weight lies in" in p and here.name in p and other.name in p for p in problems)


def test_a_missing_shard_is_one_problem(folder: Path) -> None:
    gone = shard_of(folder, f"{EXPERT}.weight")
    count = len(load_file(gone))
    gone.unlink()
    assert the_problem(folder) == f"{gone}: shard is missing ({count} tensors by the index); download it again"
    assert open_folder(folder).notes == ()  # not of total_size too


def test_what_lies_elsewhere_is_still_checked(folder: Path) -> None:
    gone = shard_of(folder, "model.norm.weight")
    remove(folder, "lm_head.weight")
    gone.unlink()
    problems = open_folder(folder).problems
    assert len(problems) == 2
    assert "lm_head.weight [160, 160] is missing" in problems[1]


def test_a_hostile_header_is_one_problem(folder: Path) -> None:
    path = shard_of(folder, f"{EXPERT}.weight")
    path.write_bytes(b"\xff" * 64)
    problem = the_problem(folder)
    assert problem.startswith(f"{path}: found a header of 18446744073709551615 bytes")


def test_a_shard_cut_short(folder: Path) -> None:
    path = shard_of(folder, "lm_head.weight")
    os.truncate(path, path.stat().st_size - 1)
    assert "in a file of" in the_problem(folder)


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "a/../../b", "", ".", "..", "a\nb", 7, None, ["a"], "n" * 2000],
)
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, file: Any) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": file}))
    with pytest.raises(CheckpointError, match="lm_head.weight lies in .*expected a file inside the folder") as caught:
        open_folder(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "file", ["missing.safetensors", "a\\..\\b.safetensors", "~", "sub/x.safetensors", "n" * 300, "sub/" * 200 + "x"]
)
def test_odd_names_are_looked_for_inside(folder: Path, file: str) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": file}))
    assert f"{folder / file}: shard is missing (1 tensors by the index)" in open_folder(folder).problems[0]


def test_what_is_no_file_is_missing(folder: Path) -> None:
    """A link in a circle, a folder, a pipe: none is waited for or followed."""
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        path.unlink()
    paths[0].symlink_to(paths[0])
    paths[1].mkdir()
    os.mkfifo(paths[2])
    problems = open_folder(folder).problems
    assert [f"{path}: shard is missing" in problem for path, problem in zip(paths, sorted(problems), strict=True)] == [
        True
    ] * 3


def test_files_that_are_not_read_are_noted(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "left over.safetensors")
    checkpoint = open_folder(folder)
    assert checkpoint.problems == ()
    assert checkpoint.notes == (f"{folder / 'left over.safetensors'}: not read, since {INDEX} does not name it",)


def test_shards_may_lie_in_subfolders_and_behind_links(folder: Path, tmp_path: Path) -> None:
    """As in the cache of huggingface_hub, where a snapshot is a folder of links."""
    shards = sorted(folder.glob("*.safetensors"))
    (folder / "sub").mkdir()
    shutil.move(shards[0], folder / "sub" / "x")
    shutil.move(shards[1], tmp_path / "blob")
    shards[1].symlink_to(tmp_path / "blob")
    edit_index(
        folder,
        lambda index: index.update(
            weight_map={k: "sub/x" if file == shards[0].name else file for k, file in index["weight_map"].items()}
        ),
    )
    assert open_folder(folder).problems == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a\\u001b": "b"}}',
        b'{"weight_map": {"a": "b", "a": "c"}}',
        b'{"weight_map": ' + b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_broken_index(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    assert str(caught.value).startswith(str(folder / INDEX))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("metadata", [{"total_size": 7}, {"total_size": "many"}, {"total_size": 1.5}])
def test_another_total_size_is_noted_and_harmless(folder: Path, metadata: Any) -> None:
    edit_index(folder, lambda index: index.update(metadata=metadata))
    checkpoint = open_folder(folder)
    assert checkpoint.problems == ()
    assert len(checkpoint.notes) == 1
    assert f"total_size is {metadata['total_size']!r}, the tensors have " in checkpoint.notes[0]


@pytest.mark.parametrize("metadata", [None, {}, [1], "x", {"format": "pt"}])
def test_an_index_without_total_size(folder: Path, metadata: Any) -> None:
    edit_index(folder, lambda index: index.update(metadata=metadata))
    checkpoint = open_folder(folder)
    assert (checkpoint.problems, checkpoint.notes) == ((), ())


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, CONFIG, WEIGHTS, n_shards=1)
    (folder / "model.safetensors").rename(folder / "weights of mine.safetensors")
    assert open_folder(folder, "bf16").problems == ()


def test_the_usual_name_of_a_single_file_wins_over_others(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, CONFIG, WEIGHTS, n_shards=1)
    save_file({"lora": torch.ones(2)}, folder / "adapter_model.safetensors")
    checkpoint = open_folder(folder, "bf16")
    assert checkpoint.problems == ()
    (note,) = checkpoint.notes
    assert note.startswith(f"{folder / 'adapter_model.safetensors'}: not read, since model.safetensors is taken")


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors file and no model.safetensors.index.json"):
        open_folder(tmp_path, "bf16")


def test_shards_without_their_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"found 3 \.safetensors files and no model.safetensors.index.json"):
        open_folder(folder)
