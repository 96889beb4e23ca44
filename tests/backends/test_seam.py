"""What the seam promises: five methods make a backend that is right, and memory comes as stated."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

import k2lite
from k2lite.backends.base import DONE, Backend, Capabilities, Event, Memory
from k2lite.backends.reference import ReferenceBackend
from k2lite.errors import BackendError
from k2lite.quant.formats import FORMAT_NAMES
from k2lite.quant.types import QuantTensor
from tests.checkpoints import random_weights, tiny_config, write_checkpoint


class FiveMethods(Backend):
    """What a third party must write, and nothing more."""

    name: ClassVar[str] = "five"
    formats = frozenset(FORMAT_NAMES)

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def capabilities(self) -> Capabilities:
        return Capabilities(self.formats, "float64 products")

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40)

    def alloc(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return (x.double() @ weight.dequantize().double().T).float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=4), format="int4")
    return tmp_path / "model"


def test_the_required_methods_alone_make_a_right_backend(folder: Path) -> None:
    ids = list(range(20))
    engine = k2lite.load(folder, backend=FiveMethods())
    expected = k2lite.load(folder, backend="reference").logits(ids)
    torch.testing.assert_close(engine.logits(ids), expected, rtol=1e-4, atol=1e-5)
    assert engine.placement.backend == "five"
    assert engine.placement.arithmetic == "float64 products"


def test_a_format_that_the_backend_lacks_is_refused_by_name(folder: Path) -> None:
    class NoInt4(FiveMethods):
        formats = frozenset({"bf16", "f32"})

    with pytest.raises(BackendError, match="backend five can't multiply int4_g32; it takes bf16, f32"):
        k2lite.load(folder, backend=NoInt4())


@pytest.mark.parametrize("nbytes", [0, 1, 63, 1000])
def test_memory_is_bytes_aligned_to_64(nbytes: int) -> None:
    memory = ReferenceBackend().alloc(nbytes)
    assert (memory.dtype, tuple(memory.shape)) == (torch.uint8, (nbytes,))
    assert memory.data_ptr() % 64 == 0


def test_upload_copies() -> None:
    source = torch.arange(6.0).view(2, 3).to(torch.bfloat16)
    there = ReferenceBackend().upload(source)
    assert torch.equal(there, source)
    source.zero_()
    assert there.any()


def test_experts_are_summed_in_ascending_order_and_the_shared_one_last() -> None:
    """In float32, 1e8 + 3 is 1e8: the rounding tells in which order the sum ran."""
    results = torch.tensor([1e8, -1e8, 3.0, 4.0]).view(1, 4, 1)
    weights, shared = torch.ones(1, 4), torch.ones(1, 1)
    backend = ReferenceBackend()
    assert backend.combine(results, weights, shared).item() == 8.0
    assert backend.combine(results[:, [0, 2, 1, 3]], weights, shared).item() == 5.0
    assert backend.combine(results[:, [2, 3, 0, 1]], weights, shared).item() == 1.0 + 8.0  # 7 + 1e8 is 8 + 1e8
    assert backend.combine(results[:, :2], weights, 3 * shared).item() == 3.0
