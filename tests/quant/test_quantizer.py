"""The streaming quantizer: what it writes, that it can be killed anywhere, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open

from k2lite.model_folder import open_model
from k2lite.quant import conversion, quantizer
from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.formats import ScaleSearch, format_named
from k2lite.quant.journal import JOURNAL_NAME
from k2lite.quant.quantizer import quantize
from k2lite.quant.recipe import Recipe
from k2lite.quant.shard_writer import PAGE, header_bytes
from k2lite.quant.types import ExpertKey
from tests.conftest import REPO
from tests.quant.quantizing import contents, make_job, make_plan, run, write_source

FULL_KILLS, SAMPLED_KILLS = 50, 5


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "fp8"
    write_source(folder, "fp8")
    return folder


@pytest.fixture(scope="module")
def finished(fp8: Path) -> dict[str, bytes]:
    destination = fp8.parent / "finished"
    run(fp8, destination)
    return contents(destination)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """By the safetensors package."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def start(source: Path, destination: Path, *, resume: bool = False, limit: int = 0) -> subprocess.Popen[str]:
    how = "resume" if resume else "anew"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.quant.quantizing", str(source), str(destination), how, str(limit)],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_values_names_and_order_are_those_of_the_plan(fp8: Path, finished: dict[str, bytes]) -> None:
    weights = write_source(fp8.parent / "again", "fp8")
    found = stored(fp8.parent / "finished")
    source = stored(fp8)
    int4 = format_named("int4_g32")
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        if ".experts." in name:
            for suffix, part in int4.quantize(value).items():
                assert torch.equal(found.pop(f"{module}.{suffix}"), part), name
        elif f"{module}.weight_scale_inv" in source:
            assert torch.equal(found.pop(f"{module}.weight").view(torch.uint8), source[name].view(torch.uint8))
            assert torch.equal(found.pop(f"{module}.weight_scale"), source[f"{module}.weight_scale_inv"])
        else:
            assert torch.equal(found.pop(name), source[name])
    assert not found
    index = json.loads(finished["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(fp8.parent / "finished").values())
    assert JOURNAL_NAME not in finished


def test_an_expert_is_one_run_and_the_first_begins_on_a_page(fp8: Path, finished: dict[str, bytes]) -> None:
    assert finished
    _, checkpoint = open_model(fp8.parent / "finished")
    assert checkpoint.problems == ()
    assert checkpoint.notes == ()
    end: dict[int, int] = {}
    for layer in checkpoint.schema.expert_layers:
        for expert in range(checkpoint.schema.n_routed_experts):
            layout = checkpoint.expert(ExpertKey(layer, expert))
            run_of_expert = layout.extents[0]
            assert len(layout.extents) <= 2  # the small weight_shape tensors stand apart
            assert run_of_expert.offset == end.get(layer, PAGE * -(-run_of_expert.offset // PAGE))
            end[layer] = run_of_expert.offset + run_of_expert.nbytes


def test_the_manifest_has_an_error_and_a_checksum_for_every_piece(fp8: Path, finished: dict[str, bytes]) -> None:
    manifest = json.loads(finished["k2lite_manifest.json"])
    assert manifest["settings"]["experts"] == "int4_g32"
    found = stored(fp8.parent / "finished")
    weights = write_source(fp8.parent / "third", "fp8")
    parts = ("weight_packed", "weight_scale")
    piece = manifest["pieces"]["layer 2, expert 5"]
    digest = xxhash.xxh3_64()
    for module, entry in piece["weights"].items():
        source = weights[f"{module}.weight"].double()
        made = format_named("int4_g32").dequantize(
            {suffix: found[f"{module}.{suffix}"] for suffix in parts}, tuple(source.shape)
        ).double()  # fmt: skip
        assert entry["relative_mse"] == pytest.approx(
            float((made - source).square().sum() / source.square().sum()), 1e-5
        )
        assert entry["cosine"] == pytest.approx(float((made * source).sum() / made.norm() / source.norm()), 1e-5)
        for suffix in parts:
            digest.update(found[f"{module}.{suffix}"].contiguous().view(torch.uint8).numpy().tobytes())
    assert piece["checksum"] == digest.hexdigest()
    assert len(piece["weights"]) == 3


def test_killed_anywhere_and_resumed_the_result_is_the_same_bytes(
    fp8: Path, finished: dict[str, bytes], tmp_path: Path, soak: bool
) -> None:
    total = sum(map(len, finished.values()))
    points = random.Random(4).sample(range(total), FULL_KILLS if soak else SAMPLED_KILLS)
    killed = 0
    for number, point in enumerate(points):
        destination = tmp_path / str(number)
        process = start(fp8, destination)
        while process.poll() is None:
            if bytes_in(destination) >= point:
                process.kill()
                break
            time.sleep(0.0005)
        process.communicate()
        killed += process.returncode == -9
        resumed = start(fp8, destination, resume=True)
        _, said = resumed.communicate(timeout=300)
        if resumed.returncode:
            assert "is finished already" in said
        assert contents(destination) == finished, f"killed at byte {point}"
    assert killed > len(points) // 2


@pytest.mark.parametrize(("target", "search"), [("int4_g32", "mse"), ("fp8_e4m3_b128", "amax"), ("bf16", "amax")])
def test_the_result_is_the_same_bytes_with_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, search: ScaleSearch
) -> None:
    """Blocks of 128 rows, so that a matrix has several."""
    write_source(tmp_path / "source", "f32", hidden_size=512)
    monkeypatch.setattr(conversion, "READ_BYTES", 1)
    recipe = Recipe(target, target, "keep", scale_search=search)
    for threads in (1, 3):
        monkeypatch.setattr(quantizer, "THREADS", threads)
        run(tmp_path / "source", tmp_path / str(threads), recipe)
    monkeypatch.setattr(conversion, "READ_BYTES", 1 << 30)
    run(tmp_path / "source", tmp_path / "whole", recipe)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    for name, data in contents(tmp_path / "whole").items():
        if name.endswith(".safetensors"):
            assert (tmp_path / "1" / name).read_bytes() == data


def bytes_in(folder: Path) -> int:
    """Of a folder that grows: a file may be renamed between being listed and being looked at."""
    total = 0
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_what_the_journal_says_of_a_damaged_piece_is_not_believed(
    fp8: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    job = make_job(fp8, tmp_path / "out")
    shard = job.plan.shards[1]
    cut = start(fp8, tmp_path / "out", limit=len(finished[shard.file]) - 1000)
    cut.communicate()
    lines = (tmp_path / "out" / JOURNAL_NAME).read_text().splitlines()[1:]
    assert 1 < sum(json.loads(line)["shard"] == 1 for line in lines) < len(shard.pieces)
    partial = tmp_path / "out" / f"{shard.file}.partial"
    with partial.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
        # in the second piece, so that the first is kept and the header before it
        file.seek(len(header_bytes(shard.tensors)) + shard.pieces[0].nbytes + 100)
        file.write(b"damage")
    run(fp8, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == finished


def test_a_disk_that_is_full_is_one_clear_error_and_the_run_goes_on_later(
    fp8: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    largest = max(len(data) for name, data in finished.items() if name.endswith(".safetensors"))
    process = start(fp8, tmp_path / "out", limit=largest - 1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert ".safetensors.partial: can't be written: File too large" in said
    assert "--resume" in said
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(RequestError, match="holds an unfinished run; go on with --resume"):
        run(fp8, tmp_path / "out")
    run(fp8, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == finished


def test_experts_are_copied_to_another_file_system_too(tmp_path: Path) -> None:
    """The kernel's own copying refuses that."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    write_source(tmp_path / "source", "int4")
    recipe = Recipe(experts="keep", trunk="int8_g128", lm_head="keep")
    run(tmp_path / "source", tmp_path / "here", recipe)
    with tempfile.TemporaryDirectory(dir=other) as folder:
        run(tmp_path / "source", Path(folder) / "there", recipe)
        assert contents(Path(folder) / "there") == contents(tmp_path / "here")


def test_a_source_that_can_t_be_read_is_named(tmp_path: Path) -> None:
    write_source(tmp_path / "source", "int4")
    job = make_job(tmp_path / "source", tmp_path / "out", Recipe(experts="keep", trunk="keep", lm_head="keep"))
    piece = next(piece for shard in job.plan.shards for piece in shard.pieces if piece.name == "layer 1, expert 0")
    gone = next(piece.matrices[0].kept_run)[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name}: .*can't be read: No such file"):
        quantize(job, resume=False, report=lambda _: None)


def test_resume_refuses_other_settings_and_another_source_by_name(fp8: Path, tmp_path: Path) -> None:
    begun = start(fp8, tmp_path / "out", limit=20_000)
    begun.communicate()
    with pytest.raises(RequestError, match="other settings: scale_search was 'amax', is 'mse'"):
        run(fp8, tmp_path / "out", Recipe("int4_g32", "keep", "keep", scale_search="mse"), resume=True)
    with pytest.raises(RequestError, match="other settings: text_only was False, is True"):
        quantize(replace(job := make_job(fp8, tmp_path / "out"), plan=replace(job.plan, text_only=True)), resume=True,
                 report=lambda _: None)  # fmt: skip
    config = fp8 / "config.json"
    before = config.stat().st_mtime_ns
    os.utime(config, ns=(before, before + 1000))
    try:
        with pytest.raises(RequestError, match=r"another source: config\.json was"):
            run(fp8, tmp_path / "out", resume=True)
    finally:
        os.utime(config, ns=(before, before))


def test_two_runs_at_once_and_a_folder_that_holds_something(fp8: Path, tmp_path: Path) -> None:
    from k2lite.quant.journal import Journal

    held = Journal(tmp_path / "out")
    with pytest.raises(RequestError, match="another k2lite is writing here"):
        run(fp8, tmp_path / "out", resume=True)
    held.close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(RequestError, match="is not empty"):
        run(fp8, tmp_path / "full")


def test_resume_on_an_absent_folder_begins(fp8: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    run(fp8, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == finished
    with pytest.raises(RequestError, match="is finished already"):
        run(fp8, tmp_path / "out", resume=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_an_error_with_file_and_weight(tmp_path: Path, value: float) -> None:
    write_source(tmp_path / "source", "bf16")
    name = "model.layers.1.mlp.experts.3.up_proj"
    _damage(tmp_path / "source", f"{name}.weight", value)
    with pytest.raises(CheckpointError, match=rf"model.*safetensors: {name}: a weight holds NaN or infinity"):
        run(tmp_path / "source", tmp_path / "out")


def test_a_matrix_of_zeros_stays_one(tmp_path: Path) -> None:
    write_source(tmp_path / "source", "bf16")
    name = "model.layers.1.mlp.experts.3.up_proj"
    _damage(tmp_path / "source", f"{name}.weight", 0.0, everywhere=True)
    run(tmp_path / "source", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert (found[f"{name}.weight_scale"] == 1).all()
    manifest = json.loads((tmp_path / "out" / "k2lite_manifest.json").read_text())
    entry = manifest["pieces"]["layer 1, expert 3"]["weights"][name]
    assert (entry["relative_mse"], entry["cosine"]) == (0.0, 1.0)


def _damage(folder: Path, name: str, value: float, *, everywhere: bool = False) -> None:
    """Write `value` over one weight, or all of a matrix, in its file."""
    _, checkpoint = open_model(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    with safe_open(file, "pt") as opened:
        count = opened.get_tensor(name).numel()
    record = checkpoint.expert(ExpertKey(1, 3))
    view = record.parts["up_proj", "weight"]
    offset = record.extents[view.extent].offset + view.offset
    numbers = torch.full((count if everywhere else 1,), value).to(torch.bfloat16)
    with file.open("r+b") as opened_file:
        opened_file.seek(offset)
        opened_file.write(numbers.view(torch.uint8).numpy().tobytes())


def test_int4_experts_are_copied_as_bytes_and_the_vision_tower_is_carried(tmp_path: Path, shared: Path) -> None:
    config = json.loads((shared / "data/Kimi-K2.5/config.json").read_text())
    text = {**config["text_config"], **_sizes()}
    del text["quantization_config"]
    write_source(tmp_path / "source", "int4", prefix="language_model.", model_type="kimi_k25", text_config=text)
    vision = {"vision_tower.patch_embed.proj.weight": torch.randn(4, 6), "mm_projector.proj.0.bias": torch.randn(3)}
    _add_shard(tmp_path / "source", vision)
    source = stored(tmp_path / "source")
    recipe = Recipe(experts="keep", trunk="int8_g128", lm_head="keep")
    run(tmp_path / "source", tmp_path / "out", recipe)
    found = stored(tmp_path / "out")
    for name, value in source.items():
        if ".experts." in name or name in vision:
            assert torch.equal(found[name], value), name
    q_b = "language_model.model.layers.0.self_attn.q_b_proj"
    wanted = format_named("int8_g128").quantize(source[f"{q_b}.weight"].float())
    assert torch.equal(found[f"{q_b}.weight_packed"], wanted["weight_packed"])
    manifest = json.loads((tmp_path / "out" / "k2lite_manifest.json").read_text())
    assert manifest["pieces"]["layer 1, expert 0"]["checksum"] == "unverified"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    assert len(written["text_config"]["quantization_config"]["config_groups"]) == 2
    assert open_model(tmp_path / "out")[1].problems == ()
    plan = make_plan(tmp_path / "source", recipe, text_only=True)
    assert plan.left_out == {"vision tower and projector (skipped: text only)": 2}


def _sizes() -> dict[str, object]:
    from tests.checkpoints import tiny_config
    from tests.quant.quantizing import WIDE

    kept = ("rope_scaling", "rms_norm_eps", "model_type", "architectures")
    return {key: value for key, value in tiny_config(**WIDE).items() if key not in kept}


def _add_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "vision.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "vision.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 12):
        write_source(tmp_path / f"source{layers}", "bf16", num_hidden_layers=layers, moe_intermediate_size=256)
        process = start(tmp_path / f"source{layers}", tmp_path / f"out{layers}")
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        peaks.append(int(said) * 1024)
    source = sum(path.stat().st_size for path in (tmp_path / "source12").iterdir())
    assert peaks[1] - peaks[0] < source / 4
    assert peaks[1] < 1.5 * 2**30
