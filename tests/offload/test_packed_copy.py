"""A packed copy beside a model: the same tokens with and without, whole or not there, and never another model's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import k2lite
from k2lite.backends.ascend.backend import AscendBackend
from k2lite.backends.base import Backend, ExpertSlot
from k2lite.backends.reference import ReferenceBackend
from k2lite.cli import main
from k2lite.errors import BackendError, CheckpointError, RequestError
from k2lite.model_folder import open_model
from k2lite.offload import packed_copy
from k2lite.offload.packed_copy import INDEX_NAME, JOURNAL_NAME, PackedCopy
from k2lite.quant.formats import QuantFormat, Shape
from k2lite.quant.types import ExpertKey, ExpertWeights, QuantTensor
from tests.backends.ascend import emulator
from tests.backends.plain_runtime import PlainRuntime
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

IDS = [3, 1, 4, 1, 5]


class Negating(ReferenceBackend):
    """Someone's: keeps every expert's bytes inverted, and inverts them back to multiply."""

    def expert_slot(self, expert: Sequence[tuple[QuantFormat, Shape]]) -> ExpertSlot:
        return ExpertSlot(super().expert_slot(expert).nbytes, repacked=True)

    def pack_expert(self, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
        there = super().pack_expert(src, slot)
        for matrix in there:
            for part in matrix.parts.values():
                part.view(torch.uint8).bitwise_not_()
        return there

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        def stored(matrix: QuantTensor) -> QuantTensor:
            parts = {name: (~part.view(torch.uint8)).view(part.dtype) for name, part in matrix.parts.items()}
            return QuantTensor(matrix.format, matrix.shape, parts)

        return super().mlp(x, weights if weights.gate_proj.shape[0] != 32 else ExpertWeights(*map(stored, weights)))


class Viewing(Negating):
    """The same with packed copies: bytes that are inverted already are copied as they are."""

    def packed_views(self, expert: Sequence[tuple[QuantFormat, Shape]], memory: torch.Tensor) -> ExpertWeights:
        return ReferenceBackend().packed_views(expert, memory)


def ascend() -> Backend:
    emulator.install()
    return AscendBackend(PlainRuntime())


def onnx() -> Backend:
    pytest.importorskip("onnxruntime")
    from k2lite.backends.onnx.backend import OnnxBackend

    return OnnxBackend()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(moe_intermediate_size=32, kv_lora_rank=64)
    folder = tmp_path_factory.mktemp("packed") / "model"
    write_checkpoint(folder, config, random_weights(config, seed=9), format="int4")
    return folder


def opened(model: Path, folder: Path, backend: Backend) -> PackedCopy:
    return PackedCopy(folder, open_model(model)[1], backend)


def logits(model: Path, backend: Backend, **options: Any) -> torch.Tensor:
    if isinstance(backend, AscendBackend):
        options |= {"host_backend": "reference", "experts_on": "device"}
    with k2lite.load(model, backend=backend, context=16, **options) as engine:
        return engine.logits(IDS)


@pytest.mark.parametrize("make", [Viewing, ascend, onnx])
def test_the_same_bits_with_and_without(model: Path, tmp_path: Path, make: Callable[[], Backend]) -> None:
    """With as few slots as there may be, so that every expert is read, by the run that writes it and by the next."""
    lines: list[str] = []
    expected = logits(model, make())
    least = 1 + json.loads((model / "config.json").read_text())["num_experts_per_tok"]
    for _ in range(2):
        options = {"packed_copy": tmp_path / "packed", "resident_experts": least, "notify": lines.append}
        assert torch.equal(logits(model, make(), **options), expected)
    assert len([line for line in lines if "writing a packed copy" in line]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}


def test_what_can_have_no_effect_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no effect with backend reference, which multiplies experts as stored"):
        logits(model, ReferenceBackend(), packed_copy=tmp_path / "packed")
    with pytest.raises(BackendError, match="backend reference lays experts out anew and has no packed_views"):
        logits(model, Unviewed(), packed_copy=tmp_path / "packed")
    with pytest.raises(RequestError, match="a mirror has no effect with a packed copy"):
        logits(model, Viewing(), packed_copy=tmp_path / "packed", mirror=model)
    with pytest.raises(RequestError, match="no effect with experts on the host"):
        k2lite.load(
            model, backend=ascend(), host_backend="reference", experts_on="host", packed_copy=tmp_path / "packed"
        )
    assert not list(tmp_path.iterdir())


class Unviewed(Negating):
    packed_views = Backend.packed_views


class Killed(BaseException):
    pass


def test_what_is_cut_off_anywhere_goes_on_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between any two experts, and with a torn journal: what is synced is not made again, and the bytes are those
    of an uninterrupted run."""
    monkeypatch.setattr(packed_copy, "SYNC_EVERY", 3)
    opened(model, tmp_path / "whole", Viewing()).write()
    total = len(json.loads((tmp_path / "whole" / INDEX_NAME).read_text())["checksums"])
    packed: list[int] = []

    class Counting(Viewing):
        left = 0

        def pack_expert(self, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
            if not self.left:
                raise Killed
            self.left -= 1
            packed.append(1)
            return super().pack_expert(src, slot)

    for cut in (0, 4, 3, 8):
        backend = Counting()
        backend.left = cut
        with pytest.raises(Killed):
            opened(model, tmp_path / "copy", backend).write()
        assert not (tmp_path / "copy").exists()
        with (tmp_path / "copy.partial" / JOURNAL_NAME).open("a") as journal:
            journal.write('{"expert": [1, ')
    synced = 3 + 3 + 6
    assert len(packed) == 4 + 3 + 8
    backend = Counting()
    backend.left = total
    opened(model, tmp_path / "copy", backend).write()
    assert len(packed) == 15 + total - synced
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, Any]:
    """Of files, and checksums whatever their order."""
    return {p.name: json.loads(p.read_text()) if p.name == INDEX_NAME else p.read_bytes() for p in folder.iterdir()}


KILLING = """
import os, signal, sys
from pathlib import Path
from k2lite.offload import packed_copy
from tests.offload.test_packed_copy import Viewing, opened
packed_copy.SYNC_EVERY = 2
real, done = packed_copy._commit, []
def commit(*arguments):
    real(*arguments)
    done.append(1)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
packed_copy._commit = commit
opened(Path(sys.argv[1]), Path(sys.argv[2]), Viewing()).write()
"""


def test_a_killed_run_is_gone_on_with(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLING, str(model), str(tmp_path / "copy")]
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["copy.partial"]
    assert len((tmp_path / "copy.partial" / JOURNAL_NAME).read_text().splitlines()) == 1 + 6
    opened(model, tmp_path / "copy", Viewing()).write()
    opened(model, tmp_path / "whole", Viewing()).write()
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")


def test_damage_is_told_with_the_file_and_never_used(model: Path, tmp_path: Path) -> None:
    opened(model, tmp_path / "copy", Viewing()).write()
    slot = opened(model, tmp_path / "copy", Viewing()).slot_bytes
    layer = sorted(tmp_path.glob("copy/layer-*.bin"))[0]
    whole = layer.read_bytes()
    flipped = bytearray(whole)
    for expert in range(len(whole) // slot):  # whichever the tokens choose
        flipped[expert * slot + 77] ^= 4
    layer.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=rf"{layer.name}: layer \d+, expert \d+: the checksum is .*remove"):
        logits(model, Viewing(), packed_copy=tmp_path / "copy")
    layer.write_bytes(whole[:-4096])
    with pytest.raises(RequestError, match=rf"{layer.name}: has {len(whole) - 4096} bytes, expected {len(whole)}"):
        opened(model, tmp_path / "copy", Viewing())
    layer.unlink()
    with pytest.raises(RequestError, match=f"{layer.name}: is not there"):
        opened(model, tmp_path / "copy", Viewing())
    layer.write_bytes(whole)
    opened(model, tmp_path / "copy", Viewing())
    (tmp_path / "copy" / INDEX_NAME).write_text("{}")
    with pytest.raises(RequestError, match="another version of packed copies: None, expected 1"):
        opened(model, tmp_path / "copy", Viewing())


def test_another_models_or_layouts_copy_is_refused_by_what_differs(model: Path, tmp_path: Path) -> None:
    opened(model, tmp_path / "copy", Viewing()).write()

    class Other(Viewing):
        name = "other"

    class Later(Viewing):
        layout_version = 2

    for backend, words in (
        (Other(), "another backend: 'reference', expected 'other'"),
        (Later(), "another layout version: 1, expected 2"),
    ):
        with pytest.raises(RequestError, match=words):
            opened(model, tmp_path / "copy", backend)
    config = tiny_config(moe_intermediate_size=32, kv_lora_rank=64)
    write_checkpoint(tmp_path / "twin", config, random_weights(config, seed=10), format="int4")
    with pytest.raises(RequestError, match="copy: holds experts of another model"):
        opened(tmp_path / "twin", tmp_path / "copy", Viewing())
    shutil.copytree(tmp_path / "copy", tmp_path / "new.partial")
    (tmp_path / "new.partial" / JOURNAL_NAME).write_text((tmp_path / "copy" / INDEX_NAME).read_text() + "\n")
    with pytest.raises(RequestError, match=r"new.partial: holds experts of another layout version"):
        opened(model, tmp_path / "new", Later()).write()


def test_plan_tells_its_bytes_and_whether_it_is_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    machine = tmp_path / "machine.json"
    machine.write_text('{"name": "a machine", "ram": "64GiB", "ram_gb_per_s": 60, "drive_gb_per_s": 3, "tflops": 1}')
    arguments = ["plan", str(model), "--backend", "onnx", "--packed-copy", str(tmp_path / "copy"), "--json"]
    arguments[2:2] = ["--machine", str(machine)]
    seen = []
    for written in (False, True):
        assert main(arguments) == 0
        facts = json.loads(capsys.readouterr().out)["packed_copy"]
        assert facts["is_whole"] is written
        seen.append(facts["bytes"])
        if not written:
            opened(model, tmp_path / "copy", onnx()).write()
    found = sum(path.stat().st_size for path in (tmp_path / "copy").glob("*.bin"))
    assert seen == [found, found]
    assert main(arguments[:-1]) == 0
    assert "packed copy" in capsys.readouterr().out
    code = main(["cpu" if word == "onnx" else word for word in arguments])
    assert (code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_an_expert_lies_where_the_copy_says(model: Path, tmp_path: Path) -> None:
    copy = opened(model, tmp_path / "copy", ascend())
    copy.write()
    key = next(iter(copy.checkpoint.expert_keys()))._replace(expert=2)
    layout = copy.expert(ExpertKey(*key))
    (extent,) = layout.extents
    raw = torch.frombuffer(bytearray(extent.file.read_bytes()[extent.offset :][: extent.nbytes]), dtype=torch.uint8)
    from k2lite.quant.expert_layout import expert_weights, read_extents

    stored = copy.checkpoint.expert(key)
    for packed, source in zip(copy.views(layout, raw), expert_weights(stored, read_extents(stored)), strict=True):
        assert torch.equal(packed.dequantize(), source.dequantize())
