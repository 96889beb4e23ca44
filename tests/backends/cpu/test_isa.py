"""Instruction sets: equal bits, and the instruction that each path is built on in its machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from k2lite.backends.cpu import isa, vector as v
from tests.conftest import REPO

PATHS = isa.available()
DISASSEMBLE = """
import numba
from k2lite.backends.cpu import isa
from k2lite.backends.cpu.int_tiles import four_rows4, four_rows8
isa.selected()
@numba.njit("void(int64,int64)")
def tile(a, n):
    four_rows4(a, n, a, n, a, n, 0, a, 0)
    four_rows8(a, n, a, n, a, n, 0, a, 0)
print(*tile.inspect_asm().values())
"""
INSTRUCTIONS = {"vnni": ("vpdpbusd", "%zmm"), "avx2": ("vpmaddubsw", "%ymm"), "generic": ("pmullw", "%xmm")}


def run(path: str, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "K2LITE_ISA": path, **changes}
    return subprocess.run([sys.executable, *command], cwd=REPO, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(len(PATHS) < 2, reason="this machine has one path only")
def test_every_path_of_this_machine_gives_the_same_bits() -> None:
    results = {}
    with ThreadPoolExecutor() as pool:  # each compiles all kernels anew
        ran = list(pool.map(lambda path: run(path, "-m", "tests.backends.cpu.digest"), PATHS))
    for path, result in zip(PATHS, ran, strict=True):
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found.pop("isa") == path
        results[path] = found
    first = results[PATHS[0]]
    assert len(first) == 22
    for path in PATHS[1:]:
        assert results[path] == first, path


@pytest.mark.parametrize("path", [path for path in PATHS if path in INSTRUCTIONS])
def test_machine_code_holds_the_instruction_of_its_path(path: str) -> None:
    result = run(path, "-c", DISASSEMBLE)
    assert result.returncode == 0, result.stderr
    instruction, register = INSTRUCTIONS[path]
    assert instruction in result.stdout
    assert register in result.stdout
    wider = {"vnni": (), "avx2": ("%zmm", "vpdpbusd"), "generic": ("%zmm", "%ymm", "vpdpbusd", "vfmadd")}[path]
    assert not [name for name in wider if name in result.stdout]


def test_a_path_that_does_not_exist_is_a_message() -> None:
    result = run("abacus", "-m", "k2lite", "run", "-p", "x")
    assert result.returncode == 2
    assert "K2LITE_ISA is 'abacus'; this processor runs" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_arm_path_compiles_to_sdot() -> None:
    """Cross-compiled only: this path was not run on hardware."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module("arm")
    module.triple = "aarch64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [v.I64] * 3), "dots")
    b = ir.IRBuilder(function.append_basic_block())
    codes, x, target = function.args
    for place, dot in ((0, v.dot_nibbles), (64, v.dot_bytes)):
        start = v.load(b, v.offset(b, target, place), v.I32X16)
        v.store(b, v.offset(b, target, place), dot(b, "neon", start, v.load(b, codes, v.I8X64), v.load(b, x, v.I8X64)))
    b.ret_void()
    target_machine = llvm.Target.from_triple(module.triple).create_target_machine(features="+dotprod", opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    assembly = target_machine.emit_assembly(parsed)
    assert assembly.count("sdot") == 4 + 8


def test_a_second_process_finds_the_kernels(tmp_path: Path) -> None:
    """And where nothing can be kept, work goes on. A kernel that compiles in no time stands for all."""
    code = (
        "from k2lite.backends.cpu.compiler import cache_folder\n"
        "from k2lite.backends.cpu.elementwise import combine\n"
        "combine.address; print(combine.compiled.cache_hits, cache_folder() is None)"
    )
    results = [run(PATHS[0], "-c", code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [result.stdout.split() for result in results] == [["0", "False"], ["1", "False"]]
    (tmp_path / "file").touch()
    result = run(PATHS[0], "-c", code, NUMBA_CACHE_DIR=str(tmp_path / "file"))
    assert result.stdout.split() == ["0", "True"], result.stderr
    assert "not kept" in result.stderr
