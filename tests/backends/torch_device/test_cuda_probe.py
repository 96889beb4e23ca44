"""Whether a card can work here, told by torch's module: each way not to says what to do. No card is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2lite.backends.torch_device.cuda_runtime import probe

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update\nmore"


def module(count: int = 1, capability: tuple[int, int] = (8, 9), error: str = "") -> Any:
    def init() -> None:
        if error:
            raise RuntimeError(error)

    return SimpleNamespace(
        device_count=lambda: count,
        init=init,
        get_device_name=lambda _: "NVIDIA Test",
        get_device_capability=lambda _: capability,
        get_device_properties=lambda _: SimpleNamespace(total_memory=24 << 30),
    )


@pytest.mark.parametrize(
    ("cuda", "built_for", "words"),
    [
        (module(), None, ("was built without CUDA", "install a build with it")),
        (module(count=0), "13.0", ("finds no NVIDIA card", "nvidia-smi")),
        (module(error=TOO_OLD), "13.0", ("don't agree", "too old", "install a newer driver")),
        (module(capability=(7, 5)), "13.0", ("compute capability 7.5", "8.0", "--backend cpu")),
    ],
)
def test_each_way_not_to_work_says_what_to_do(cuda: Any, built_for: str | None, words: tuple[str, ...]) -> None:
    found = probe(cuda, built_for)
    assert not found.ready
    assert all(word in found.reason for word in words)
    assert "\n" not in found.reason


def test_a_card_that_works_is_named_with_its_memory() -> None:
    found = probe(module(count=2), "13.0")
    assert found.ready
    assert found.reason == "NVIDIA Test; 1 more are not used"
    assert found.devices[0].memory_bytes == 24 << 30


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_this_torch_says_that_it_has_no_cuda() -> None:
    assert "was built without CUDA" in probe().reason
