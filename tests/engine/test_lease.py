"""Each sentence of the lease contract in offload/source.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import k2lite
from k2lite.errors import CheckpointError
from k2lite.offload.resident import ResidentSource
from k2lite.offload.statistics import RouterStats


@pytest.fixture
def source(tiny_folder: Path) -> ResidentSource:
    experts = k2lite.load(tiny_folder).experts
    assert isinstance(experts, ResidentSource)
    return experts


def test_released_exactly_once(source: ResidentSource) -> None:
    with source.lease(1, [0]) as lease:
        pass
    with pytest.raises(RuntimeError, match="released twice"):
        lease.release()


def test_released_when_its_block_fails_and_of_no_use_afterwards(source: ResidentSource) -> None:
    with pytest.raises(ZeroDivisionError), source.lease(1, [0]) as lease:
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="after its release"):
        next(iter(lease.ready()))
    with pytest.raises(RuntimeError, match="released twice"):
        lease.release()


def test_views_stay_valid_until_the_release(source: ResidentSource, tiny_folder: Path) -> None:
    """Whatever is leased meanwhile: the bytes are those of the files at the end too."""
    stored = {name: t for path in tiny_folder.glob("*.safetensors") for name, t in load_file(path).items()}
    with source.lease(1, [3, 6]) as lease:
        held = {number: weights for group in lease.ready() for number, weights in group.items()}
        for layer in (1, 2):
            with source.lease(layer, list(range(8))) as other:
                list(other.ready())
        for number, weights in held.items():
            for projection, tensor in weights._asdict().items():
                for suffix, part in tensor.parts.items():
                    name = f"model.layers.1.mlp.experts.{number}.{projection}.{suffix}"
                    assert torch.equal(part, stored[name])


def test_every_expert_comes_once_and_resident_ones_first(source: ResidentSource) -> None:
    with source.lease(1, [5, 2]) as lease:
        assert [sorted(group) for group in lease.ready()] == [[5], [2]]
    with source.lease(1, [0, 2, 3, 5]) as lease:
        assert [sorted(group) for group in lease.ready()] == [[2, 5], [0], [3]]


def test_each_expert_asked_for_is_counted_once_and_read_once(source: ResidentSource) -> None:
    for _ in range(3):
        with source.lease(2, [1, 4]) as lease:
            list(lease.ready())
    assert (source.counters.requested_experts, source.counters.read_experts) == (6, 2)
    one = source.lease(2, [1])
    assert source.counters.requested_experts == 7
    with one:
        (group,) = one.ready()
    assert source.counters.read_bytes == 2 * sum(tensor.nbytes for tensor in group[1])


def test_asking_twice_for_one_expert_is_an_error(source: ResidentSource) -> None:
    with pytest.raises(ValueError, match="asked for twice"):
        source.lease(1, [3, 3])


def test_a_failed_read_raises_where_it_is_leased_with_file_and_expert(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    source = k2lite.load(folder).experts
    for shard in folder.glob("*.safetensors"):
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 8)
    with (
        pytest.raises(CheckpointError, match=r"\.safetensors.*") as caught,
        source.lease(2, list(range(8))) as lease,
    ):
        list(lease.ready())
    assert "expert" in str(caught.value)


def test_router_statistics_count_choices_and_weights() -> None:
    stats = RouterStats([2, 5], 6)
    stats.observe(5, torch.tensor([[0, 3], [3, 4]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    assert stats.counts.tolist() == [[0] * 6, [1, 0, 0, 2, 1, 0]]
    assert stats.weight_sums[1].tolist() == [0.25, 0, 0, 1.25, 0.5, 0]
    assert stats.distinct_experts == 3
