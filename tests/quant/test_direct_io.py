"""Reading and writing past the page cache against plain bytes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from k2lite.quant import direct_reading, direct_writing
from k2lite.quant.direct_reading import PAGE, read_direct, read_direct_into
from k2lite.quant.direct_writing import DirectWriter
from k2lite.quant.errors import CheckpointError
from tests.samples import examples

FIXTURE_OF_FUNCTION = [HealthCheck.function_scoped_fixture]


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8).tobytes()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 1), (0, PAGE), (1, PAGE), (PAGE - 1, 2), (PAGE, 3 * PAGE), (5000, 15_000), (19_999, 1)]
)
def test_any_range_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, nbytes: int, direct: bool
) -> None:
    if not direct:
        monkeypatch.setattr(direct_reading, "_DIRECT", 0)
    data = noise(20_000)
    (tmp_path / "file").write_bytes(data)
    assert read_direct(tmp_path / "file", offset, nbytes, "tensor a").numpy().tobytes() == data[offset:][:nbytes]
    monkeypatch.setattr(direct_reading, "_STAGE_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct_reading, "_thread", threading.local())
    into = torch.zeros(nbytes + 3, dtype=torch.uint8)
    read_direct_into(tmp_path / "file", offset, into[1:-2], "tensor a")
    assert into.numpy().tobytes() == b"\0" + data[offset:][:nbytes] + b"\0\0"


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(noise(PAGE + 10))
    with pytest.raises(CheckpointError, match="file: tensor a: found 10 of 11 bytes at offset 4096"):
        read_direct(tmp_path / "file", PAGE, 11, "tensor a")
    with pytest.raises(CheckpointError, match="absent: tensor a can't be read: No such file"):
        read_direct(tmp_path / "absent", 0, 1, "tensor a")
    with pytest.raises(CheckpointError, match="file: tensor a: found 10 of 11 bytes at offset 4096"):
        read_direct_into(tmp_path / "file", PAGE, torch.zeros(11, dtype=torch.uint8), "tensor a")


@given(
    start=st.integers(0, 2 * PAGE),
    steps=st.lists(st.one_of(st.integers(0, 5 * PAGE), st.sampled_from(["flush", "move"])), max_size=12),
    direct=st.booleans(),
)
@settings(max_examples=examples(40), deadline=None, suppress_health_check=FIXTURE_OF_FUNCTION)
def test_what_is_appended_is_in_the_file_after_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, steps: list[int | str], direct: bool
) -> None:
    """Buffers of two pages, so that they are changed; "move" has another write in between, as copied ranges do."""
    monkeypatch.setattr(direct_writing, "BUFFER_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct_writing, "_DIRECT", os.O_DIRECT if direct else 0)
    path = tmp_path / "file"
    expected = noise(start)
    path.write_bytes(expected)
    fd = os.open(path, os.O_RDWR)
    writer = DirectWriter(path, fd, start)
    for number, step in enumerate([*steps, "flush"]):
        if isinstance(step, int):
            data = noise(step, number)
            writer.append(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
            expected += data
            continue
        writer.flush()
        assert path.read_bytes() == expected
        if step == "move":
            expected += noise(777, number)
            os.pwrite(fd, noise(777, number), len(expected) - 777)
            writer.move(len(expected))
    writer.close()
    os.close(fd)
    assert path.read_bytes() == expected


def test_an_error_of_the_writing_thread_is_raised_by_a_later_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_writing, "BUFFER_BYTES", PAGE)
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)  # nothing can be written here the plain way
    monkeypatch.setattr(direct_writing, "_DIRECT", 0)
    writer = DirectWriter(tmp_path / "file", fd, 0)
    writer.append(torch.zeros(PAGE, dtype=torch.uint8))
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.flush()
    writer.close()
    os.close(fd)
