"""The file of moments, how few tokens are weighed, and what `quantize` does with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2lite.model_folder import open_model
from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.formats import format_named
from k2lite.quant.moments import PRIOR_TOKENS, Moments, open_moments, write_moments
from k2lite.quant.quantizer import MANIFEST_NAME, Job, quantize
from k2lite.quant.recipe import Recipe
from tests.quant.quantizing import make_job, write_source

AT = "model.layers.1.mlp.experts."
MSE = Recipe(experts="int4_g32", trunk="keep", lm_head="keep", scale_search="mse")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moments") / "source"
    write_source(folder, "fp8", num_hidden_layers=2)
    return folder


def record(source: Path, path: Path, *, seed: int = 0, leave_out: str = "-") -> Path:
    """Random moments of every matrix."""
    _, checkpoint = open_model(source)
    generator = torch.Generator().manual_seed(seed)
    widths = checkpoint.schema.matrix_widths()
    made = {
        name: (torch.rand(width, generator=generator) ** 4, 1000)
        for name, width in widths.items()
        if leave_out not in name and not (".experts." in name and name.endswith("up_proj"))
    }
    write_moments(path, made, model=checkpoint.fingerprint(), tokens=1000)
    return path


def with_moments(source: Path, destination: Path, path: Path, recipe: Recipe = MSE) -> Job:
    _, checkpoint = open_model(source)
    return replace(make_job(source, destination, recipe), importance=open_moments(path, checkpoint))


def run(job: Job, *, resume: bool = False) -> None:
    quantize(job, resume=resume, report=lambda _: None)


def test_few_tokens_are_drawn_towards_the_layers_mean(tmp_path: Path) -> None:
    path = tmp_path / "m"
    entries = {
        f"{AT}0.gate_proj": (torch.tensor([1.0, 2.0]), 300),
        f"{AT}1.gate_proj": (torch.tensor([5.0, 0.0]), 100),
        f"{AT}2.gate_proj": (torch.zeros(2), 0),
        f"{AT}0.down_proj": (torch.tensor([4.0, 0.0]), 300),
        f"{AT}1.down_proj": (torch.tensor([0.0, 8.0]), 100),
        f"{AT}2.down_proj": (torch.zeros(2), 0),
        "lm_head": (torch.tensor([7.0, 9.0]), 400),
    }
    write_moments(path, entries, model="x", tokens=400)
    moments = Moments(path)
    mean = torch.tensor([2.0, 1.5])  # by hand: (300 * 1 + 100 * 5) / 400, (300 * 2) / 400
    share = 100 / (100 + PRIOR_TOKENS)
    assert torch.allclose(moments.of(f"{AT}1.up_proj"), share * torch.tensor([5.0, 0.0]) + (1 - share) * mean)
    assert torch.allclose(moments.of(f"{AT}2.gate_proj"), mean)
    # units of a down_proj have no common meaning: (300 * 4 + 100 * 8) / 400 / 2 units
    assert torch.allclose(moments.of(f"{AT}2.down_proj"), torch.tensor([2.5, 2.5]))
    assert torch.equal(moments.of("lm_head"), torch.tensor([7.0, 9.0]))
    assert moments.widths()[f"{AT}1.up_proj"] == 2
    # another reader finds what was written
    assert load_file(path)[f"{AT}1.gate_proj.count"].tolist() == [100]


def test_a_folder_has_the_weights_that_the_weighted_search_finds(source: Path, tmp_path: Path) -> None:
    path = record(source, tmp_path / "m")
    run(with_moments(source, tmp_path / "out", path))
    _, before = open_model(source)
    moments = Moments(path)
    module = f"{AT}3.up_proj"
    stored = {name: part for file in (tmp_path / "out").glob("*.safetensors") for name, part in load_file(file).items()}
    values = {name: part for file in source.glob("*.safetensors") for name, part in load_file(file).items()}
    scale = values[f"{module}.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    weight = values[f"{module}.weight"].float() * scale
    expected = format_named("int4_g32").quantize(weight, scale_search="mse", importance=moments.of(module))
    plain = format_named("int4_g32").quantize(weight, scale_search="mse")
    assert torch.equal(stored[f"{module}.weight_scale"], expected["weight_scale"])
    assert torch.equal(stored[f"{module}.weight_packed"], expected["weight_packed"])
    assert not torch.equal(stored[f"{module}.weight_packed"], plain["weight_packed"])
    settings = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["settings"]
    assert settings["importance"] == moments.identity
    assert before.fingerprint() == open_model(tmp_path / "out")[1].fingerprint()


def test_a_run_is_not_resumed_with_other_moments(source: Path, tmp_path: Path) -> None:
    first, second = record(source, tmp_path / "first"), record(source, tmp_path / "second", seed=1)
    job = with_moments(source, tmp_path / "out", first)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(job, resume=False, report=stop)
    with pytest.raises(RequestError, match="other settings: importance was 'xxh3 "):
        run(with_moments(source, tmp_path / "out", second), resume=True)
    with pytest.raises(RequestError, match="is None"):
        run(make_job(source, tmp_path / "out", MSE), resume=True)
    run(job, resume=True)


def test_what_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    path = record(source, tmp_path / "m", leave_out="experts.5.gate")
    with pytest.raises(RequestError, match=r"has nothing for model.layers.1.mlp.experts.5.gate_proj, model.*up_proj"):
        run(with_moments(source, tmp_path / "out", path))
    trunk = replace(MSE, experts="keep", trunk="int4_g32")
    run(with_moments(source, tmp_path / "trunk", path, trunk))  # what is not quantized may be missing
    assert not (tmp_path / "out").exists()


def test_moments_of_another_model_are_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_source(other, "fp8", num_hidden_layers=2, q_lora_rank=256)
    with pytest.raises(RequestError, match="was recorded on another model"):
        with_moments(source, tmp_path / "out", record(other, tmp_path / "m"))


def test_other_files_and_other_searches_are_refused(source: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(RequestError, match="holds no moments"):
        Moments(tmp_path / "weights")
    path = record(source, tmp_path / "m")
    with pytest.raises(RequestError, match="--importance weighs the errors of --scale-search mse"):
        run(with_moments(source, tmp_path / "out", path, replace(MSE, scale_search="amax")))
    bad = {f"{AT}0.gate_proj": (torch.tensor([torch.nan]), 1)}
    write_moments(tmp_path / "nan", bad, model="x", tokens=1)
    with pytest.raises(CheckpointError, match="negative, NaN or infinite"):
        Moments(tmp_path / "nan").of(f"{AT}0.gate_proj")
