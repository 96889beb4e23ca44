"""Compiled kernels that are kept: the next process finds them, and none is used once any source of it has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO

KERNEL = """
from k2lite.quant.compiling import inner, kernel
from loops.helper import step

@kernel
def run(x):
    return step(x)
"""
HELPER = """
from k2lite.quant.compiling import inner

@inner
def step(x):
    return x + {}
"""
PROGRAM = "from loops.kernel import run; print(run(1), run.__wrapped__.__name__)"


def result(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": f"{folder}{os.pathsep}{REPO}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def write(folder: Path, added: int) -> None:
    (folder / "loops").mkdir(exist_ok=True)
    (folder / "loops/__init__.py").touch()
    (folder / "loops/kernel.py").write_text(KERNEL, encoding="utf-8")
    (folder / "loops/helper.py").write_text(HELPER.format(added), encoding="utf-8")


def kept(cache: Path) -> set[Path]:
    return set(cache.rglob("*.nbc"))


def test_a_change_of_an_inlined_function_is_seen(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write(tmp_path, 1)
    assert result(tmp_path, cache).stdout.split()[0] == "2"
    first = kept(cache)
    assert first
    assert result(tmp_path, cache).stdout.split()[0] == "2"
    assert kept(cache) == first  # found, not made again
    stamp = (tmp_path / "loops/kernel.py").stat()
    write(tmp_path, 100)
    os.utime(tmp_path / "loops/kernel.py", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # to Numba it is the same file
    assert result(tmp_path, cache).stdout.split()[0] == "101"


def test_where_nothing_can_be_kept_it_works_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "file").touch()
    done = result(tmp_path, tmp_path / "file")
    assert done.stdout.split()[0] == "2"
    assert "not kept" in done.stderr
