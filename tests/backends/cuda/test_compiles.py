"""Kernels compile for cards that are not here, without spills and within the shared memory of a program there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.conftest import REPO

# Bytes that a program may have: A100, RTX 40 (RTX 30 and 50 have as much), H100.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
SOME = [
    (90, "experts int4_g32, 1 tokens"),
    (89, "linear fp8_e4m3_b128 [1536, 7168], 1 tokens"),
    (80, "linear int8_channel [12288, 1536], 4096 tokens"),
]


def test_kernels_compile_for_cards_that_are_not_here(tmp_path: Path, soak: bool) -> None:
    asked = [(card, "all") for card in SHARED] if soak else SOME
    words = [str(word) for pair in asked for word in pair]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "tests.backends.cuda.compiling", *words]
    run = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {fact["card"] for fact in found} == set(SHARED)
    assert [fact for fact in found if fact["spill_bytes"]] == []
    assert [fact for fact in found if fact["shared_bytes"] > SHARED[fact["card"]]] == []
