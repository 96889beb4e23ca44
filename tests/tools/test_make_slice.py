"""A slice is a standard folder whose model lives; at K2's true width its headers are the published ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

import k2lite
from k2lite.cli import main as k2lite_main
from k2lite.config import parse_config
from k2lite.errors import CheckpointError, ConfigError, K2LiteError, RequestError
from k2lite.model_folder import open_model
from k2lite.quant.formats import FORMAT_NAMES, format_named
from k2lite.quant.types import ExpertKey
from tests.quant.headers import inventory_tensors
from tools.k2_slice import drawing, writing
from tools.k2_slice.drawing import block_shapes, draw
from tools.k2_slice.layout import Weight
from tools.make_slice import main, make_slice, peer_bytes, plan_slice, report

# 192 and 320 are no multiples of 128: FP8 has edge blocks.
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
# int8_g128 and int4_g128 ask for rows of 128 columns or a multiple.
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 384, "q_lora_rank": 128, "kv_lora_rank": 128}
SMALL: dict[str, Any] = {"layers": 3, "experts": 16, "vocab": 520, "sizes": SIZES}
IDS = [(7 * at * at + 3) % 512 for at in range(12)]


@pytest.fixture(scope="module", params=["fp8", "int4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slice") / str(request.param)
    make_slice(path, format=str(request.param), **SMALL)
    return path


def test_the_folder_opens_without_problems_in_moonshot_s_formats(folder: Path) -> None:
    config, checkpoint = open_model(folder)
    assert (checkpoint.problems, checkpoint.notes, config.unknown_keys) == ((), (), ())
    assert (config.num_hidden_layers, config.n_routed_experts, config.vocab_size) == (3, 16, 520)
    table = {kind: set(uses) for kind, uses in checkpoint.formats().items()}
    experts, trunk = {"fp8": ("fp8_e4m3_b128",) * 2, "int4": ("int4_g32", "bf16")}[folder.name]
    assert table == {
        "embeddings": {"bf16"},
        "norms": {"bf16"},
        "router": {"bf16", "f32"},
        "head": {"bf16"},
        "attention": {trunk},
        "dense mlp": {trunk},
        "shared experts": {trunk},
        "routed experts": {experts},
    }
    assert list(folder.parent.iterdir()) == [folder]


def test_the_model_lives(folder: Path) -> None:
    engine = k2lite.load(folder, backend="reference", context=64)
    assert engine.tokenizer.encode("Hi") == [ord("H"), ord("i")]
    logits = engine.logits(IDS)
    assert torch.isfinite(logits).all()
    assert 0.5 < float(logits.std()) < 2  # neither dead nor grown
    assert engine.experts.stats.distinct_experts > 2 * 10  # of 32: tokens choose differently


def test_the_package_safetensors_reads_every_shard(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    seen = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            seen |= {name: (path.name, file.get_tensor(name).nbytes) for name in file.keys()}  # noqa: SIM118
    assert index["weight_map"] == {name: file for name, (file, _) in seen.items()}
    assert index["metadata"]["total_size"] == sum(nbytes for _, nbytes in seen.values())


def test_an_expert_is_one_run_and_runs_follow_one_another(folder: Path) -> None:
    _, checkpoint = open_model(folder)
    at = 0
    for expert in range(16):
        layout = checkpoint.expert(ExpertKey(1, expert))
        small = 24 if folder.name == "int4" else 0  # weight_shape of three projections stand apart
        run = min(layout.extents, key=lambda extent: extent.offset)
        assert sum(extent.nbytes for extent in layout.extents) - run.nbytes in (0, small)
        if not at:
            at = run.offset
            assert at % 4096 == 0
        assert run.offset == at
        weights = [view for (_, suffix), view in layout.parts.items() if suffix != "weight_shape"]
        at += sum(view.dtype.itemsize * math.prod(view.shape) for view in weights)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(folder: Path, tmp_path: Path) -> None:
    make_slice(tmp_path / "again", format=folder.name, **SMALL)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first
    make_slice(tmp_path / "other", format=folder.name, seed=1, **SMALL)
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("format", "trunk", "lm_head", "kept"),
    [
        ("int4", "int8_g128", "int8_g128", None),
        ("int4", "int8_g128", None, "bf16"),
        ("int4", None, "int8_channel", "bf16"),
        ("int4", "int4_g128", "int8_g128", None),
        ("int4", "fp8_e4m3_b128", None, "bf16"),
        ("fp8", "bf16", "f16", None),
        ("fp8", "int8_g128", "bf16", None),
    ],
)
def test_trunk_and_head_have_the_formats_asked_for(
    tmp_path: Path, format: str, trunk: str | None, lm_head: str | None, kept: str | None
) -> None:
    make_slice(tmp_path / "m", format=format, trunk=trunk, lm_head=lm_head, layers=2, experts=8, vocab=512, sizes=WIDE)
    config, checkpoint = open_model(tmp_path / "m")
    assert checkpoint.problems == ()
    table = {kind: set(uses) for kind, uses in checkpoint.formats().items()}
    assert table["attention"] == table["dense mlp"] == table["shared experts"] == {trunk or "bf16"}
    assert table["head"] == {lm_head or kept}
    assert table["embeddings"] == {"bf16"}
    # values, not only names: the head's rows have the spread that a head must have
    head = checkpoint.trunk("lm_head.weight").dequantize()
    assert float(head.std()) == pytest.approx(config.hidden_size**-0.5, rel=0.05)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_blocks_of_rows_join_to_the_whole_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "BLOCK_ELEMENTS", 1)  # 128 rows at a time
    weight = Weight("w.weight", (700, 256), format_named(name), 0.0, 0.25)
    parts = list(draw(weight, 3))
    assert len(parts) == 6
    joined = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in weight.format.parts(weight.shape)}
    if "weight_shape" in joined:
        joined["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int32)
    assert {suffix: (part.dtype, tuple(part.shape)) for suffix, part in joined.items()} == weight.format.parts(
        weight.shape
    )
    values = weight.format.dequantize(joined, weight.shape)
    assert float(values.std()) == pytest.approx(0.25, rel=0.1)  # FP8 has 12 scales here, each a quarter up or down
    assert abs(float(values.mean())) < 0.005
    assert len({row.numpy().tobytes() for row in values}) == 700  # no row twice
    if name.startswith("int4"):
        nibbles = joined["weight_packed"].numpy().view(np.uint8)
        assert 0 not in nibbles & 15  # the code -8
        assert 0 not in nibbles >> 4


def test_a_block_is_small_whatever_the_weight() -> None:
    shapes = list(block_shapes((163840, 7168)))
    assert sum(rows for rows, _ in shapes) == 163840
    assert all(rows % 128 == 0 and rows * columns <= 1 << 22 for rows, columns in shapes)


@pytest.mark.parametrize(("format", "inventory"), [("fp8", "Kimi-K2-Instruct"), ("int4", "Kimi-K2-Thinking")])
def test_at_true_width_the_tensors_are_the_published_ones(shared: Path, format: str, inventory: str) -> None:
    """The first three layers with all experts, from headers only; inv_freq is left out, which no reader needs."""
    known = json.loads((shared / "data/derived/tensor_inventory.json").read_text())
    (found,) = [value for key, value in known.items() if key.startswith(inventory)]
    fewer = {61: 3, 60: 2, 60 * 384: 2 * 384, 1: 1}  # copies in all layers, in the MoE layers, of each expert
    patterns = [
        {**item, "copies": fewer[item["copies"]]} for item in found["patterns"] if "inv_freq" not in item["pattern"]
    ]
    _, shards = plan_slice(layers=3, experts=384, vocab=163840, format=format)
    entries: dict[str, Any] = {}
    for shard in shards:
        header = json.loads(shard.header[8:])
        assert len(shard.header) % 4096 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        entries |= header
    expected = inventory_tensors(patterns, layers=3)
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()} == expected
    assert sum(shard.data_bytes for shard in shards) == sum(p["copies"] * p["bytes_each"] for p in patterns)


def test_at_true_width_an_int4_expert_is_6048_pages() -> None:
    _, shards = plan_slice(layers=2, experts=384, vocab=32768, format="int4")
    runs: dict[str, list[int]] = {}
    for tensor in shards[2].tensors:
        if ".experts." in tensor.name and tensor.suffix != "weight_shape":
            runs.setdefault(tensor.name.split(".")[5], []).append(tensor.offset)
    assert list(runs) == [str(expert) for expert in range(384)]
    assert [offsets[0] for offsets in runs.values()] == [6048 * 4096 * expert for expert in range(384)]
    assert all(tensor.offset % 8 == 0 for tensor in shards[2].tensors)


def test_the_peers_bytes_summed_by_hand() -> None:
    """Every tensor that llama.cpp has for 384 experts and 3 layers, summed by hand."""
    d, f, dense, vocab = 7168, 2048, 18432, 32768
    attention = 1536 * d + 12288 * 1536 + 576 * d + 64 * 512 * 128 + 64 * 128 * 512 + d * 8192
    q8 = 2 * vocab * d + 3 * attention + 3 * dense * d + 2 * 3 * f * d
    f32 = d + 3 * (d + 1536 + 512 + d) + 2 * (384 * d + 384)
    q4 = 2 * 3 * 384 * f * d
    raw, _ = plan_slice(layers=3, experts=384, vocab=vocab, format="int4")
    found = peer_bytes(parse_config(raw, Path("config.json")))
    assert found == (q8 * 34 // 32 + f32 * 4, vocab * d * 34 // 32, q4 * 18 // 32)
    assert found[0] + found[2] == pytest.approx(20.4e9, rel=0.01)


def test_the_exported_slice_has_the_peers_bytes(folder: Path, tmp_path: Path) -> None:
    """As the gguf package counts them."""
    assert k2lite_main(["export", str(folder), str(tmp_path / "slice.gguf"), "--type", "q4_0"]) == 0
    trunk, _, experts = peer_bytes(open_model(folder)[0])
    kinds: dict[str, int] = {}
    for tensor in gguf.GGUFReader(tmp_path / "slice.gguf").tensors:
        kind = tensor.tensor_type.name
        kinds[kind] = kinds.get(kind, 0) + int(tensor.n_bytes)
    assert kinds["Q4_0"] == experts
    assert kinds["Q8_0"] + kinds["F32"] == trunk


def test_the_report_counts_the_folder_s_bytes(folder: Path) -> None:
    shown = report(folder)
    _, checkpoint = open_model(folder)
    for number in (checkpoint.trunk_bytes, checkpoint.experts_bytes):
        assert f"{number:,}" in shown
    assert f"routed experts   {'fp8_e4m3_b128' if folder.name == 'fp8' else 'int4_g32'}" in shown


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vocab": 511}, RequestError, "the byte tokenizer alone has 512"),
        ({"experts": 4}, ConfigError, "num_experts_per_tok"),
        ({"layers": 0}, ConfigError, "num_hidden_layers"),
        ({"trunk": "int7"}, CheckpointError, "'int7' is unknown; known: bf16"),
        ({"lm_head": "int4_g128"}, CheckpointError, "multiple of 128 columns, found 192"),
        ({"seed": -1}, RequestError, "the seed is -1"),
    ],
)
def test_what_can_t_be_is_refused_before_a_byte_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[K2LiteError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_slice(tmp_path / "m", **{**SMALL, "format": "int4", **changes})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RequestError, match="exists already"):
        make_slice(tmp_path / "full", **SMALL)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cases = [
        (writing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}), r"needs .* GB and 0.0 GB are free"),
        (writing.os, "posix_fallocate", full, "can't be written: No space left"),
    ]
    for module, name, replacement, message in cases:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, replacement)
            with pytest.raises(RequestError, match=message):
                make_slice(tmp_path / "m", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_command_says_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "m"), "--vocab", "5"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("make_slice: a vocabulary of 5 asked for")
    assert err.count("\n") == 1
