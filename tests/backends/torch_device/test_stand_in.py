"""The stand-in itself: each misuse that a real device would answer with wrong numbers now and then, it sees at once."""

from __future__ import annotations

import pytest
import torch

from k2lite.backends.torch_device.pinned import host_pages
from tests.stand_in.clocks import MisuseError
from tests.stand_in.runtime import POISON, StandInRuntime

PAGE = 4096


@pytest.fixture
def runtime() -> StandInRuntime:
    return StandInRuntime(seed=3)


@pytest.fixture
def host(runtime: StandInRuntime) -> torch.Tensor:
    memory = host_pages(PAGE)
    memory.fill_(7)
    runtime.pin(memory)
    return memory


@pytest.fixture(autouse=True)
def nothing_happens_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInRuntime, "let_something_happen", lambda _: None)


def test_a_kernel_that_does_not_wait_for_a_copy_is_a_race(runtime: StandInRuntime, host: torch.Tensor) -> None:
    there, stream = runtime.empty(PAGE), runtime.new_stream()
    stream.wait(runtime.compute_stream().record())
    runtime.copy(host, there, stream)
    with pytest.raises(MisuseError, match="a copy on stream 1 writes, and no event says which comes first"):
        there.sum()
    runtime.compute_stream().wait(stream.record())
    assert int(there.sum()) == 7 * PAGE


def test_a_copy_into_what_a_kernel_may_still_read_is_a_race(runtime: StandInRuntime, host: torch.Tensor) -> None:
    there, stream = runtime.empty(2 * PAGE), runtime.new_stream()
    stream.wait(runtime.compute_stream().record())
    runtime.copy(host, there[:PAGE], stream)
    runtime.compute_stream().wait(stream.record())
    there[:PAGE].clone()
    runtime.copy(host, there[PAGE:], stream)  # beside it
    with pytest.raises(MisuseError, match="writes bytes .* reads, and no event"):
        runtime.copy(host, there[:PAGE], stream)
    stream.wait(runtime.compute_stream().record())
    runtime.copy(host, there[:PAGE], stream)


def test_copies_are_late_and_take_the_bytes_of_then(runtime: StandInRuntime, host: torch.Tensor) -> None:
    there, up, down = runtime.empty(PAGE), runtime.new_stream(), runtime.new_stream()
    up.wait(runtime.compute_stream().record())
    runtime.copy(host, there, up)
    assert set(there.inner.tolist()) == {POISON}  # type: ignore[attr-defined]
    host.fill_(8)  # too early: this is what arrives
    sent = up.record()
    assert not sent.query()
    sent.synchronize()
    assert sent.query()
    back = host_pages(PAGE)
    runtime.pin(back)
    runtime.copy(there, back, down)
    assert set(back.tolist()) == {0}
    down.record().synchronize()
    assert set(back.tolist()) == {8}


def test_memory_of_the_host_must_be_pinned_once_and_in_whole_pages(runtime: StandInRuntime, host: torch.Tensor) -> None:
    there, stream = runtime.empty(PAGE), runtime.new_stream()
    stream.wait(runtime.compute_stream().record())
    with pytest.raises(MisuseError, match="not pinned"):
        runtime.copy(torch.zeros(PAGE, dtype=torch.uint8), there, stream)
    with pytest.raises(MisuseError, match="twice"):
        runtime.pin(host)
    with pytest.raises(MisuseError, match="whole pages"):
        runtime.pin(torch.zeros(100, dtype=torch.uint8))
    runtime.copy(host, there, stream)
    with pytest.raises(MisuseError, match="while copies may be under way"):
        runtime.unpin(host)


def test_the_host_can_t_touch_the_memory_nor_mix_it_with_its_own(runtime: StandInRuntime) -> None:
    there = runtime.empty(64)
    with pytest.raises(MisuseError, match="the host reads"):
        there.numpy()
    with pytest.raises(MisuseError, match="of the host and of the device"):
        there + torch.ones(64, dtype=torch.uint8)
    with pytest.raises(MisuseError, match="without memory"):
        there + torch.ones(64, dtype=torch.uint8, device=runtime.device)


def test_memory_runs_out_and_comes_back(runtime: StandInRuntime) -> None:
    with runtime.only(1000):
        held = runtime.empty(500)
        with pytest.raises(torch.OutOfMemoryError):
            runtime.empty(500)
        del held
        runtime.empty(500)
