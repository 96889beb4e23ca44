"""Every tensor name, dtype and shape of the published checkpoints opens without a problem, at full size.

The folders are headers and holes, made from the inventory of names whose totals equal the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2lite.model_folder import open_model
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.types import ExpertKey
from tests.quant.headers import Entry, inventory_tensors, write_sparse_folder

INT4_PROJECTION = 2048 * 7168 // 2 + 2048 * 7168 // 32 * 2 + 8


def write_published(folder: Path, shared: Path, *, config: str, inventory: str, n_shards: int) -> dict[str, Any]:
    """The folder of a published model, tensors in the order of its layers over `n_shards`; returns its inventory."""
    known = json.loads((shared / "data/derived/tensor_inventory.json").read_text())
    (found,) = [value for key, value in known.items() if key.startswith(inventory)]
    tensors = inventory_tensors(found["patterns"])
    assert len(tensors) == found["tensors"]
    shards: dict[str, dict[str, Entry]] = {}
    for number, (name, entry) in enumerate(tensors.items()):
        shard = number * n_shards // len(tensors) + 1
        shards.setdefault(f"model-{shard}-of-{n_shards}.safetensors", {})[name] = entry
    assert write_sparse_folder(folder, shards) == found["total_bytes"]
    (folder / "config.json").write_text((shared / "data" / config).read_text())
    return dict(found)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Checkpoint:
    folder = tmp_path_factory.mktemp("instruct")
    write_published(folder, shared, config="Kimi-K2-Instruct/config.json", inventory="Kimi-K2-Instruct", n_shards=61)
    return open_model(folder)[1]


@pytest.fixture(scope="module")
def k25(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Checkpoint:
    folder = tmp_path_factory.mktemp("k25")
    write_published(folder, shared, config="Kimi-K2.5/config.json", inventory="Kimi-K2.5", n_shards=64)
    return open_model(folder)[1]


def test_kimi_k2_instruct_has_no_problem_and_the_published_sizes(instruct: Checkpoint) -> None:
    assert (instruct.problems, instruct.notes) == ((), ())
    assert len(instruct.shards) == 61
    assert [len(names) for names in instruct.ignored.values()] == [61]  # inv_freq
    assert instruct.expert_bytes == 44_050_944
    assert instruct.experts_bytes == 44_050_944 * 60 * 384
    inv_freq = 61 * 56 * 2
    assert instruct.trunk_bytes == 1_029_173_256_720 - instruct.experts_bytes - inv_freq


def test_kimi_k25_has_no_problem_and_the_published_sizes(k25: Checkpoint) -> None:
    assert (k25.problems, k25.notes) == ((), ())
    assert len(k25.shards) == 64
    assert [len(names) for names in k25.ignored.values()] == [335]  # vision tower and projector
    assert k25.expert_bytes == 3 * INT4_PROJECTION == 24_772_632
    assert k25.experts_bytes == 24_772_632 * 60 * 384
    assert k25.formats()["routed experts"].keys() == {"int4_g32"}
    assert k25.formats()["routed experts"]["int4_g32"].tensors == 60 * 384 * 3


def test_formats_by_class(instruct: Checkpoint) -> None:
    table = {kind: {name: use.tensors for name, use in uses.items()} for kind, uses in instruct.formats().items()}
    assert table == {
        "attention": {"fp8_e4m3_b128": 61 * 5},
        "dense mlp": {"fp8_e4m3_b128": 3},
        "shared experts": {"fp8_e4m3_b128": 60 * 3},
        "routed experts": {"fp8_e4m3_b128": 60 * 384 * 3},
        "router": {"bf16": 60, "f32": 60},
        "embeddings": {"bf16": 1},
        "head": {"bf16": 1},
        "norms": {"bf16": 61 * 4 + 1},
    }
    assert sum(use.nbytes for uses in instruct.formats().values() for use in uses.values()) == (
        instruct.trunk_bytes + instruct.experts_bytes
    )


def test_an_expert_of_k25_is_inside_its_file(k25: Checkpoint) -> None:
    layout = k25.expert(ExpertKey(60, 383))
    assert layout.nbytes >= 24_772_632
    for extent in layout.extents:
        assert extent.offset + extent.nbytes <= extent.file.stat().st_size
