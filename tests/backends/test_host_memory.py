"""Memory that may still be taken, with control groups of both versions as files of our own."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from k2lite.backends.host_memory import host_memory

MIB = 1 << 20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_without_a_limit_it_is_the_machine_s(tmp_path: Path, proc: Path) -> None:
    for lines in ("", "0::/app\n", "5:memory:/app\n0::/\n"):
        proc.write_text(lines)
        write(tmp_path / "fs" / "app", memory__max="max", memory__current=str(50 * MIB))
        found = host_memory(proc, tmp_path / "fs")
        assert found.total_bytes == psutil.virtual_memory().total
        assert 0 < found.available_bytes <= found.total_bytes
    assert host_memory(tmp_path / "none", tmp_path).total_bytes == psutil.virtual_memory().total


def test_a_limit_of_version_2_counts_without_the_page_cache(tmp_path: Path, proc: Path) -> None:
    proc.write_text("0::/slice/app\n")
    write(tmp_path / "fs" / "slice" / "app", memory__max=str(100 * MIB), memory__current=str(70 * MIB))
    assert host_memory(proc, tmp_path / "fs").available_bytes == 30 * MIB
    write(tmp_path / "fs" / "slice" / "app", memory__stat=f"anon 1\ninactive_file {20 * MIB}")
    found = host_memory(proc, tmp_path / "fs")
    assert (found.total_bytes, found.available_bytes) == (100 * MIB, 50 * MIB)


def test_the_tightest_group_above_decides(tmp_path: Path, proc: Path) -> None:
    proc.write_text("0::/slice/app\n")
    write(tmp_path / "fs" / "slice" / "app", memory__max=str(100 * MIB), memory__current=str(10 * MIB))
    write(tmp_path / "fs" / "slice", memory__max=str(80 * MIB), memory__current=str(60 * MIB))
    found = host_memory(proc, tmp_path / "fs")
    assert (found.total_bytes, found.available_bytes) == (80 * MIB, 20 * MIB)


def test_version_1_and_a_group_that_is_over_its_limit(tmp_path: Path, proc: Path) -> None:
    """In a container the path that /proc shows is the host's; the mount point itself is looked at too."""
    proc.write_text("9:cpu:/other\n5:memory:/docker/x\n")
    write(tmp_path / "fs" / "memory" / "other", memory__limit_in_bytes=str(MIB))  # not this process's group
    write(
        tmp_path / "fs" / "memory",
        memory__limit_in_bytes=str(100 * MIB),
        memory__usage_in_bytes=str(120 * MIB),
        memory__stat=f"cache 7\ntotal_inactive_file {5 * MIB}",
    )
    found = host_memory(proc, tmp_path / "fs")
    assert (found.total_bytes, found.available_bytes) == (100 * MIB, 0)
