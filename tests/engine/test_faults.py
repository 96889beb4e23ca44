"""A drive that fails under a running engine: the request fails with a name, the engine goes on; nothing hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.engine import Chunk
from k2lite.errors import CheckpointError
from k2lite.offload.cache import ExpertCache
from tests.conftest import REPO
from tests.offload.caches import FaultyFiles, io_error

IDS = [3, 1, 4, 1, 5, 9, 2, 6]

SLOW_RUN = """
import os, sys, time
from pathlib import Path
import k2lite
from tests.offload.caches import FaultyFiles
engine = k2lite.load(sys.argv[1], backend="reference", context=64, resident_experts=4)
def slow(path, offset):
    os.write(1, b"reading\\n")
    time.sleep(60)
engine.experts.store.files = FaultyFiles(slow)
engine.logits([1, 2, 3])
"""


def test_a_request_that_meets_a_bad_drive_fails_and_the_next_one_runs(engine: k2lite.Engine, tiny_folder: Path) -> None:
    expected = engine.logits(IDS)
    other = k2lite.load(tiny_folder, backend="reference", context=64, resident_experts=5)
    cache = other.experts
    assert isinstance(cache, ExpertCache)
    files = FaultyFiles()
    cache.store.files = files
    with other.open(64) as sequence:
        other.prefill(sequence, IDS[:4])
        files.fault = io_error
        for _ in range(3):
            with pytest.raises(CheckpointError, match=r"layer \d, expert \d can't be read: Input/output error"):
                other.step([Chunk(sequence, IDS[4:])])
        assert sequence.ids == IDS[:4]
        files.fault = None
        (logits,) = other.step([Chunk(sequence, IDS[4:])])
    assert torch.equal(logits[0], expected[-1])
    assert torch.equal(other.logits(IDS), expected)


def test_sigterm_in_mid_read_ends_the_process_at_once(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", SLOW_RUN, str(tiny_folder)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"reading\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - sent < 30
