"""A drive that fails under a running engine: the request fails with a name, the engine goes on; nothing hangs."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.engine import Chunk
from k2lite.errors import CheckpointError, RequestError
from k2lite.offload.cache import ExpertCache
from k2lite.offload.routing_trace import TracedModel
from k2lite.routing_recording import record_routing
from tests.conftest import REPO
from tests.offload.caches import FaultyFiles, io_error
from tests.offload.test_lease import settled
from tests.offload.test_store import manifest_for, open_files

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


class Faults:
    """Faults of all kinds at a drive: `plan` one, and it strikes from a chosen read on, in files of folder `at`."""

    KINDS = ("EIO", "vanished", "short", "flipped", "slow")

    def __init__(self, files: FaultyFiles) -> None:
        self.files, self.struck, self.kind = files, 0, ""
        self._lock, self.strikes = threading.Lock(), threading.local()
        files.fault, files.spoil = self._before, self._after

    def plan(self, kind: str, at: Path | None, first: int) -> None:
        self.kind, self.at, self.reads, self.first, self.hits = kind, at, 0, first, False

    def _strikes(self, path: Path) -> bool:
        if not self.kind or path.parent != self.at:
            return False
        with self._lock:
            self.reads += 1
            strikes = self.reads > self.first
            self.struck += strikes and not self.hits
            self.hits = self.hits or strikes
        return strikes

    def _before(self, path: Path, _offset: int) -> None:
        self.strikes.now = self._strikes(path)
        if self.strikes.now and self.kind in ("EIO", "vanished"):
            code = errno.EIO if self.kind == "EIO" else errno.ENODEV
            raise OSError(code, os.strerror(code))
        if self.strikes.now and self.kind == "slow":
            time.sleep(0.005)  # a read takes some 50 microseconds here

    def _after(self, _path: Path, view: memoryview, count: int) -> int:
        if self.strikes.now and self.kind == "flipped":
            view[:count] = bytes(byte ^ 0x10 for byte in view[:count])
        return 0 if self.strikes.now and self.kind == "short" else count


@pytest.mark.parametrize("mirrored", [False, True], ids=["alone", "with a mirror"])
def test_no_token_comes_from_wrong_bytes_and_nothing_leaks(
    engine: k2lite.Engine, tiny_folder: Path, tmp_path: Path, mirrored: bool, soak: bool
) -> None:
    """A request meets a drive that fails, vanishes, ends early, lies or dawdles: it raises with file, layer and
    expert, or its logits are right to the bit. With a mirror, of which one copy at a time is bad, it never raises."""
    folder, mirror = tmp_path / "model", tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    manifest_for(folder)
    shutil.copytree(tiny_folder, mirror)
    drawn = random.Random(5)
    expected = {n: engine.logits(IDS[:n]) for n in range(1, len(IDS) + 1)}
    before = set(threading.enumerate())
    other = k2lite.load(
        folder, backend="reference", context=64, resident_experts=5, mirror=mirror if mirrored else None
    )
    cache = other.experts
    assert isinstance(cache, ExpertCache)
    cache.store._say = lambda _: None
    cache.store.files = files = FaultyFiles()
    faults = Faults(files)
    said: list[str] = []
    threads, wanted = len(set(threading.enumerate()) - before), 500 if soak else 25
    while faults.struck < wanted:
        cache.store._failed.clear()  # the drive is back; a copy that failed is not asked again otherwise
        faults.plan(
            drawn.choice(Faults.KINDS), drawn.choice((folder, mirror)) if mirrored else folder, drawn.randrange(9)
        )
        length = drawn.randint(1, len(IDS))
        try:
            logits = other.logits(IDS[:length])
        except CheckpointError as error:
            said.append(str(error))
        else:
            assert torch.equal(logits, expected[length]), faults.kind
    assert [text for text in said if not re.search(r"model-.*\.safetensors: layer \d, expert \d", text)] == []
    assert len(said) == 0 if mirrored else len(said) > wanted // 3
    faults.kind = ""
    assert torch.equal(other.logits(IDS), expected[len(IDS)])
    settled(cache)
    assert len(set(threading.enumerate()) - before) == threads
    copies = (folder, mirror) if mirrored else (folder,)
    assert sum(len(open_files(copy)) for copy in copies) <= sum(
        len(list(copy.glob("*.safetensors"))) for copy in copies
    )
    other.close()
    assert not set(threading.enumerate()) - before
    assert not open_files(folder)


def test_a_full_disk_loses_the_trace_and_nothing_else(
    engine: k2lite.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write fails with the file's name, an older trace stays, nothing partial is left, and the engine goes on."""
    expected = engine.logits(IDS)
    model = TracedModel("tiny", "kimi_k2", engine.config.moe_layers, engine.config.n_routed_experts)
    trace = record_routing(engine, IDS, model)
    trace.write(tmp_path / "t.trace")
    old = (tmp_path / "t.trace").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for file in ("t.trace", "new.trace"):
            with pytest.raises(RequestError, match=rf"{file}: can't be written: No space left on device"):
                trace.write(tmp_path / file)
    assert [path.name for path in tmp_path.iterdir()] == ["t.trace"]
    assert (tmp_path / "t.trace").read_bytes() == old
    assert torch.equal(engine.logits(IDS), expected)
    assert engine.experts.observers == ()


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
