"""A folder against what the model must have: each thing that can be wrong is a problem with a file and a tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import CheckpointError
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.quantization_config import parse_quantization_config
from k2lite.quant.types import PROJECTIONS, ExpertKey
from tests.checkpoints import FP8_CONFIG, INT4_CONFIG, write_checkpoint
from tests.quant.damage import (
    CONFIG,
    DECLARED,
    EXPERT,
    EXPERT_SHAPES,
    Q_A,
    WEIGHTS,
    add,
    change,
    open_folder,
    remove,
    schema_of,
    shard_of,
    the_problem,
)


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("format", DECLARED)
def test_every_weight_reads_as_its_writer_says(tmp_path: Path, format: str, n_shards: int, prefix: str) -> None:
    folder = tmp_path / "model"
    values = write_checkpoint(folder, CONFIG, WEIGHTS, format=format, n_shards=n_shards, prefix=prefix)
    checkpoint = open_folder(folder, format, prefix)
    assert (checkpoint.problems, checkpoint.notes, checkpoint.ignored) == ((), (), {})
    checkpoint.raise_for_problems()
    for name in checkpoint.schema.trunk:
        tensor = checkpoint.trunk(name)
        assert torch.equal(tensor.dequantize(), values[name]), name
        assert tensor.shape == tuple(values[name].shape)
    for expert in range(4):
        layout = checkpoint.expert(ExpertKey(1, expert))
        weights = expert_weights(layout, read_extents(layout))
        for projection, tensor in zip(PROJECTIONS, weights, strict=True):
            expected = values[f"model.layers.1.mlp.experts.{expert}.{projection}.weight"]
            assert torch.equal(tensor.dequantize(), expected)
            assert tensor.shape == EXPERT_SHAPES[projection]


@pytest.mark.parametrize("format", DECLARED)
def test_bytes_are_those_of_the_files(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, CONFIG, WEIGHTS, format=format)
    checkpoint = open_folder(folder, format)
    stored = {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}
    one = sum(tensor.nbytes for name, tensor in stored.items() if ".mlp.experts.0." in name)
    assert checkpoint.expert_bytes == one
    assert checkpoint.experts_bytes == 4 * one
    assert checkpoint.trunk_bytes == sum(tensor.nbytes for tensor in stored.values()) - 4 * one
    assert {s.path: s.nbytes for s in checkpoint.shards} == {p: p.stat().st_size for p in folder.glob("*.safetensors")}


def test_formats_are_told_by_class(folder: Path) -> None:
    counts = {k: {f: use.tensors for f, use in uses.items()} for k, uses in open_folder(folder).formats().items()}
    assert counts == {
        "embeddings": {"bf16": 1},
        "norms": {"bf16": 9},
        "attention": {"fp8_e4m3_b128": 10},
        "dense mlp": {"fp8_e4m3_b128": 3},
        "router": {"bf16": 1, "f32": 1},
        "shared experts": {"fp8_e4m3_b128": 3},
        "head": {"bf16": 1},
        "routed experts": {"fp8_e4m3_b128": 12},
    }


def test_missing_trunk_tensor(folder: Path) -> None:
    remove(folder, "model.norm.weight")
    assert the_problem(folder) == f"{folder}: tensor model.norm.weight [160] is missing"
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not there"):
        open_folder(folder).trunk("model.norm.weight")


def test_missing_expert(folder: Path) -> None:
    for suffix in ("weight", "weight_scale_inv"):
        remove(folder, f"{EXPERT}.{suffix}")
    assert the_problem(folder) == f"{folder}: expert {EXPERT} [96, 160] is missing"
    with pytest.raises(CheckpointError, match="layer 1, expert 2 is not there"):
        open_folder(folder).expert(ExpertKey(1, 2))
    with pytest.raises(CheckpointError, match="layer 0, expert 9 is not there"):
        open_folder(folder).expert(ExpertKey(0, 9))


def test_missing_bias_of_the_router(folder: Path) -> None:
    remove(folder, "model.layers.1.mlp.gate.e_score_correction_bias")
    assert "e_score_correction_bias [4] is missing" in the_problem(folder)


@pytest.mark.parametrize("module", [Q_A, EXPERT])
def test_scale_without_weight_and_weight_without_scale(folder: Path, module: str) -> None:
    path = remove(folder, f"{module}.weight")
    assert (
        f"{module} has weight_scale_inv, expected weight; or weight, weight_scale_inv; or weight, weight_scale; or"
        in the_problem(folder)
    )
    add(folder, f"{module}.weight", torch.zeros(40, 160, dtype=torch.float8_e4m3fn), to=f"{module}.weight_scale_inv")
    remove(folder, f"{module}.weight_scale_inv")
    problem = the_problem(folder)
    expected = "expected a weight_scale_inv (or, in compressed-tensors, weight_scale) beside it"
    assert f"{module} has a weight of dtype float8_e4m3fn, {expected}" in problem
    assert path.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.4.up_proj.weight",
        "model.layers.1.mlp.experts.02.up_proj.weight",
        "model.layers.1.mlp.experts.²2.up_proj.weight",
        "model.layers.1.mlp.experts." + "9" * 900 + ".up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        f"{EXPERT}.bias",
        "language_model.model.norm.weight",
        "model.norm.weight.weight",
        "inv_freq",
        "xvision_tower.a",
        "model.norm",
        "norm.weight_scale_inv",
    ],
)
def test_extra_tensor(folder: Path, name: str) -> None:
    add(folder, name, torch.zeros(3))
    problem = the_problem(folder)
    assert problem == f"{shard_of(folder, name)}: tensor {name} is not part of this model (see config.json)"


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_extra_part_of_a_weight(folder: Path, suffix: str) -> None:
    add(folder, f"{EXPERT}.{suffix}", torch.zeros(3))
    assert f"{EXPERT} has weight, " in the_problem(folder)
    assert suffix in the_problem(folder)


def test_known_extras_are_listed(folder: Path) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.b", "vision_tower.a.weight"]
    for name in names:
        add(folder, name, torch.zeros(3))
    checkpoint = open_folder(folder)
    assert checkpoint.problems == ()
    assert {reason: sorted(found) for reason, found in checkpoint.ignored.items()} == {
        "rotary frequencies": names[:1],
        "vision": sorted(names[1:]),
    }


def read(checkpoint: Checkpoint, name: str) -> None:
    if name.startswith(EXPERT):
        checkpoint.expert(ExpertKey(1, 2))
    else:
        checkpoint.trunk(name)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (f"{Q_A}.weight", lambda t: t.view(torch.uint8)[:39].view(t.dtype), "has shape [39, 160], expected [40, 160]"),
        (f"{Q_A}.weight", lambda t: t.view(torch.uint8).t().contiguous().view(t.dtype), "has shape [160, 40]"),
        (f"{Q_A}.weight", lambda t: t.view(torch.uint8)[None].view(t.dtype), "has shape [1, 40, 160]"),
        (f"{Q_A}.weight", lambda t: t.float(), "has dtype float32, expected float8_e4m3fn"),
        (f"{Q_A}.weight_scale_inv", lambda t: t[:, :1], "has shape [1, 1], expected [1, 2]"),
        (f"{Q_A}.weight_scale_inv", lambda t: t.to(torch.bfloat16), "has dtype bfloat16, expected float32"),
        (f"{EXPERT}.weight_scale_inv", lambda t: t.flatten(), "has shape [2], expected [1, 2]"),
        (f"{EXPERT}.weight", lambda t: t.view(torch.uint8)[:, :128].view(t.dtype), "has shape [96, 128]"),
        ("model.norm.weight", lambda t: t[:-1], "has shape [159], expected [160]"),
        ("model.embed_tokens.weight", lambda t: t[1:], "has shape [159, 160], expected [160, 160]"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", lambda t: t[None], "has shape [1, 4], expected [4]"),
    ],
)
def test_misshapen_and_mistyped(
    folder: Path, name: str, value: Callable[[torch.Tensor], torch.Tensor], expected: str
) -> None:
    change(folder, name, value)
    problem = the_problem(folder)
    assert problem.startswith(f"{shard_of(folder, name)}: tensor {name} {expected}")
    checkpoint = open_folder(folder)
    with pytest.raises(CheckpointError, match="not there as this model needs it"):
        read(checkpoint, name.replace("_scale_inv", ""))


def test_integers_are_no_weights(folder: Path) -> None:
    change(folder, "model.norm.weight", lambda t: t.to(torch.int32))
    assert "model.norm has a weight of dtype int32, expected bfloat16, float16 or float32" in the_problem(folder)


def test_a_plain_weight_in_a_quantized_folder_is_read_as_it_is(folder: Path) -> None:
    remove(folder, f"{EXPERT}.weight_scale_inv")
    change(folder, f"{EXPERT}.weight", lambda t: t.to(torch.bfloat16))
    checkpoint = open_folder(folder)
    assert checkpoint.problems == ()
    assert checkpoint.formats()["routed experts"].keys() == {"fp8_e4m3_b128", "bf16"}
    layout = checkpoint.expert(ExpertKey(1, 2))
    assert layout.formats["up_proj"].name == "bf16"


class TestDeclaration:
    def test_fp8_tensors_without_a_declaration(self, folder: Path) -> None:
        checkpoint = open_folder(folder, "bf16")
        assert len(checkpoint.problems) == 10 + 3 + 3 + 12
        assert "is stored as fp8_e4m3_b128, and config.json has no quantization_config" in checkpoint.problems[0]

    def test_fp8_tensors_with_another_declaration(self, folder: Path) -> None:
        assert "which config.json's quantization_config does not say of it" in open_folder(folder, "int4").problems[0]

    def test_a_tensor_that_must_be_plain(self, folder: Path) -> None:
        change(folder, "model.layers.1.mlp.gate.weight", lambda t: t.to(torch.float8_e4m3fn))
        add(folder, "model.layers.1.mlp.gate.weight_scale_inv", torch.ones(1, 2))
        assert "model.layers.1.mlp.gate is stored as fp8_e4m3_b128, expected bf16, f16 or f32" in the_problem(folder)

    def test_a_vector_with_the_parts_of_a_matrix(self, folder: Path) -> None:
        add(folder, "model.norm.weight_scale_inv", torch.ones(2))
        assert "fp8_e4m3_b128 stores matrices [out, in], found the shape [160]" in the_problem(folder)
        remove(folder, "model.norm.weight_scale_inv")
        remove(folder, "model.norm.weight")
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            add(folder, f"model.norm.{suffix}", torch.ones(2))
        assert (
            "model.norm has weight_packed of shape [2] and weight_scale of shape [2], which none of int4_g32"
            in the_problem(folder)
        )

    def test_an_ignored_module_must_not_be_packed(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_checkpoint(folder, CONFIG, WEIGHTS, format="int4")
        module = "model.layers.1.mlp.shared_experts.up_proj"
        remove(folder, f"{module}.weight")
        add(folder, f"{module}.weight_packed", torch.zeros(96, 20, dtype=torch.int32))
        add(folder, f"{module}.weight_scale", torch.zeros(96, 5, dtype=torch.bfloat16))
        add(folder, f"{module}.weight_shape", torch.tensor([96, 160], dtype=torch.int32))
        assert f"{module} is stored as int4_g32, which config.json's quantization_config" in the_problem(folder, "int4")

    @pytest.mark.parametrize(
        ("suffix", "value", "expected"),
        [
            ("weight_scale", lambda t: t[:, :1], "has shape [160, 1], expected [160, 3]"),
            ("weight_scale", lambda t: t.flatten(), "has shape [480], expected [160, 3]"),
            ("weight_scale", lambda t: t.float(), "has dtype float32, expected bfloat16"),
            ("weight_packed", lambda t: t[:, 1:], "has shape [160, 11], expected [160, 12]"),
        ],
    )
    def test_packed_tensors_of_other_shapes_than_declared(
        self, tmp_path: Path, suffix: str, value: Callable[[torch.Tensor], torch.Tensor], expected: str
    ) -> None:
        folder, name = tmp_path / "model", f"model.layers.1.mlp.experts.0.down_proj.{suffix}"
        write_checkpoint(folder, CONFIG, WEIGHTS, format="int4")
        change(folder, name, value)
        assert the_problem(folder, "int4") == f"{shard_of(folder, name)}: tensor {name} {expected}"

    def test_another_width_than_declared(self, tmp_path: Path) -> None:
        folder, module = tmp_path / "model", "model.layers.1.mlp.experts.0.down_proj"
        write_checkpoint(folder, CONFIG, WEIGHTS, format="int4")
        change(folder, f"{module}.weight_packed", lambda t: t.repeat(1, 2))
        change(folder, f"{module}.weight_scale", lambda t: t[:, :1])
        assert f"{module} is stored as int8_channel, which config.json's quant" in the_problem(folder, "int4")

    def test_compressed_tensors_name_of_the_scale_under_method_fp8(self, folder: Path) -> None:
        path = shard_of(folder, f"{Q_A}.weight_scale_inv")
        scale = load_file(path)[f"{Q_A}.weight_scale_inv"]
        remove(folder, f"{Q_A}.weight_scale_inv")
        add(folder, f"{Q_A}.weight_scale", scale, to=f"{Q_A}.weight")
        expected = f"tensor {Q_A}.weight_scale must be named weight_scale_inv with quant_method 'fp8'"
        assert the_problem(folder).endswith(expected)


class TestWeightShape:
    """The content of weight_shape is data: it is checked when the tensor is read."""

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_right(self, tmp_path: Path, dtype: torch.dtype) -> None:
        folder = tmp_path / "model"
        values = write_checkpoint(folder, CONFIG, WEIGHTS, format="int4")
        change(folder, f"{EXPERT}.weight_shape", lambda t: t.to(dtype))
        layout = open_folder(folder, "int4").expert(ExpertKey(1, 2))
        up_proj = expert_weights(layout, read_extents(layout)).up_proj
        assert torch.equal(up_proj.dequantize(), values[f"{EXPERT}.weight"])

    @pytest.mark.parametrize("stated", [[40, 160], [160, 40], [40, 161], [40, -160]])
    def test_of_a_trunk_tensor(self, folder: Path, stated: list[int]) -> None:
        """Nothing is ignored in this folder's declaration, so that a packed trunk tensor is allowed."""
        codes = torch.randint(-(2**31), 2**31, (40, 20), dtype=torch.int32)
        for suffix in ("weight", "weight_scale_inv"):
            remove(folder, f"{Q_A}.{suffix}")
        add(folder, f"{Q_A}.weight_packed", codes)
        add(folder, f"{Q_A}.weight_scale", torch.full((40, 5), 0.5, dtype=torch.bfloat16))
        add(folder, f"{Q_A}.weight_shape", torch.tensor(stated, dtype=torch.int32))
        declared = parse_quantization_config({**INT4_CONFIG, "ignore": []}, folder / "config.json")
        checkpoint = Checkpoint.open(folder, schema_of(WEIGHTS), declared)
        if stated == [40, 160]:
            value = checkpoint.trunk(f"{Q_A}.weight").dequantize()
            assert torch.equal(value[:, 8:16:7], (((codes[:, 1:2] >> torch.tensor([0, 28])) & 15) - 8) * 0.5)
            return
        with pytest.raises(CheckpointError, match=rf"^{folder}: {Q_A}.weight: weight_shape holds .*\[40, 160\]"):
            checkpoint.trunk(f"{Q_A}.weight")

    def test_wrong(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_checkpoint(folder, CONFIG, WEIGHTS, format="int4")
        change(folder, f"{EXPERT}.weight_shape", lambda t: t.flip(0))
        checkpoint = open_folder(folder, "int4")
        assert checkpoint.problems == ()
        layout = checkpoint.expert(ExpertKey(1, 2))
        with pytest.raises(
            CheckpointError,
            match=r"\.safetensors: layer \d, expert 2, up_proj: weight_shape holds \[160, 96\], expected \[96, 160\]",
        ):
            expert_weights(layout, read_extents(layout))


def test_the_error_shows_the_first_problems_and_their_number(folder: Path) -> None:
    checkpoint = open_folder(folder, "bf16")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.raise_for_problems()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{folder}: the weights can't be used, 28 problems:"
    assert [line.strip() for line in lines[1:11]] == list(checkpoint.problems[:10])
    assert lines[11].strip() == f"... and 18 more: k2lite info {folder} lists all"
    assert len(lines) == 12


def test_a_file_that_shrinks_after_opening(folder: Path) -> None:
    checkpoint = open_folder(folder)
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 3000)
    path = shard_of(folder, "lm_head.weight")
    with pytest.raises(CheckpointError, match=rf"^{path}: tensor lm_head.weight: found \d+ of 51200 bytes at offset"):
        checkpoint.trunk("lm_head.weight")
    with pytest.raises(CheckpointError, match="safetensors: layer 1, expert 2: found"):
        read_extents(checkpoint.expert(ExpertKey(1, 2)))
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"^{path}: tensor lm_head.weight can't be read: No such file"):
        checkpoint.trunk("lm_head.weight")


def test_a_schema_of_other_sizes_is_answered_with_problems(folder: Path) -> None:
    quantization = parse_quantization_config(FP8_CONFIG, folder)
    schema = replace(schema_of(WEIGHTS), hidden_size=200, n_routed_experts=3, expert_layers=(1, 2))
    problems = Checkpoint.open(folder, schema, quantization).problems
    # 3 experts of layer 1: weights and edge blocks of the wrong size; expert 3 is extra; layer 2 is missing
    assert sum("has shape" in problem for problem in problems) >= 9
    assert sum("experts.3." in problem and "not part of this model" in problem for problem in problems) == 6
    assert sum("model.layers.2.mlp.experts" in problem and "is missing" in problem for problem in problems) == 9
