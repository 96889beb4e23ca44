"""The compute threads: how many, who may use them, and when they stop."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.backends.cpu import compute_team
from k2lite.backends.cpu.backend import CpuBackend
from k2lite.backends.cpu.cgroup_quota import cgroup_processors
from k2lite.backends.cpu.compute_team import ComputeTeam, allowed_threads
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.errors import BackendError, RequestError
from tests.backends.cpu.samples import normal, product, weight
from tests.conftest import REPO

FORK = """
import os, sys, torch
from k2lite.backends.cpu.backend import CpuBackend
from k2lite.errors import BackendError
backend = CpuBackend(threads=2)
x, w = torch.ones(1, 8), torch.ones(8)
backend.rms_norm(x, w, 1e-6)
child = os.fork()
if not child:
    try:
        backend.rms_norm(x, w, 1e-6)
    except BackendError as error:
        os._exit(7 if "forked child" in str(error) and "spawn" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
backend.rms_norm(x, w, 1e-6)
"""


def test_threads_are_what_the_process_may_use() -> None:
    assert ComputeTeam().threads == allowed_threads() <= len(os.sched_getaffinity(0))
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from k2lite.backends.cpu.compute_team import allowed_threads; print(allowed_threads())"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("rows", [255, 256, 257, 511, 2999])
def test_tasks_that_are_taken_by_the_handful_run_each(rows: int) -> None:
    x, weight_of_one = torch.randn(rows, 160, generator=torch.Generator().manual_seed(rows)), torch.ones(160)
    alone, together = CpuBackend(threads=1), CpuBackend(threads=2)
    expected = torch.cat([alone.rms_norm(row[None], weight_of_one, 1e-6) for row in x])
    assert torch.equal(together.rms_norm(x, weight_of_one, 1e-6), expected)
    alone.close()
    together.close()


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_a_number_of_threads_out_of_range_is_refused(threads: int) -> None:
    with pytest.raises(RequestError, match=f"threads is {threads}; expected 1 to 1024"):
        ComputeTeam(threads)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_control_groups_share_of_time(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("0::/a/b\n")
    write(root / "a" / "b", cpu__max="150000 100000\n")
    write(root / "a", cpu__max="max 100000\n")
    assert list(cgroup_processors(proc, root)) == [2]
    proc.write_text("4:cpu,cpuacct:/job\n3:memory:/job\n")
    write(root / "cpu" / "job", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    write(root / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert list(cgroup_processors(proc, root)) == [1]
    assert list(cgroup_processors(tmp_path / "none", root)) == []


def test_many_threads_may_call_at_once(cpu: CpuBackend) -> None:
    matrix, x = weight("int4_g32", 64, 256, 1), normal(3, 256, seed=2)
    expected = cpu.linear(x, matrix)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            if not torch.equal(cpu.linear(x, matrix), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_is_refused_with_a_message() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


# One job of a thousand million tasks; all but the first have nothing to do, which still takes a minute.
LONG_JOB = """
import torch
from k2lite.backends.cpu.activations import INT4, prepare
from k2lite.backends.cpu.compute_team import ComputeTeam
team, x, out = ComputeTeam(), torch.ones(32), torch.empty(4096, dtype=torch.uint8)
table = torch.empty(1, dtype=torch.int64)
def run(pieces, tasks):
    team.launch(prepare, [x.data_ptr(), 0, 32, out.data_ptr(), 0, INT4, pieces, 0, table.data_ptr(), 0, 0, 0], tasks)
run(1, 1)  # whatever is compiled or loaded at the first call is there now
print("ready", flush=True)
try:
    run(10**12, 10**9)
    print("finished")
except KeyboardInterrupt:
    run(1, 1)
    print("interrupted")
"""


def test_a_long_job_hears_ctrl_c_and_the_team_goes_on() -> None:
    child = subprocess.Popen([sys.executable, "-c", LONG_JOB], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    threading.Event().wait(0.3)
    child.send_signal(signal.SIGINT)
    try:
        assert child.communicate(timeout=60)[0] == "interrupted\n"
        assert child.returncode == 0
    finally:
        child.kill()


def test_a_closed_team_has_no_helpers_left() -> None:
    gc.collect()  # teams that other tests have dropped end now, not below
    before = threading.active_count()
    team = ComputeTeam(3)
    assert threading.active_count() == before + 2
    team.close()
    assert threading.active_count() == before


def compute_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "k2lite-compute"]


def test_a_team_ends_under_its_lock_and_gives_up_on_who_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the interpreter's exit a thread may be in a job: two that drive one team would hang."""
    monkeypatch.setattr(compute_team, "PATIENCE_S", 0.05)
    gc.collect()
    before = len(compute_threads())
    team, taken, go_on = ComputeTeam(3), threading.Event(), threading.Event()

    def work() -> None:
        with team:
            taken.set()
            go_on.wait()

    worker = threading.Thread(target=work)
    worker.start()
    taken.wait()
    end = team._end.detach()
    assert end is not None
    _, function, arguments, _ = end
    function(*arguments)
    assert len(compute_threads()) == before + 2
    go_on.set()
    worker.join()
    function(*arguments)
    assert len(compute_threads()) == before


def test_a_dropped_team_has_no_helpers_left() -> None:
    gc.collect()
    before = len(compute_threads())
    team = ComputeTeam(3)
    assert len(compute_threads()) == before + 2
    del team
    gc.collect()
    assert len(compute_threads()) == before


def test_an_engine_closes_the_backend_that_was_opened_for_it_and_no_other(cpu: CpuBackend) -> None:
    gc.collect()
    before = len(compute_threads())
    with k2lite.load(DEMO_FOLDER, backend="cpu", context=64, threads=3) as engine:
        engine.logits([1, 2])
        assert len(compute_threads()) == before + 2
    assert len(compute_threads()) == before
    with pytest.raises(BackendError, match="closed"):
        engine.backend.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-6)
    k2lite.load(DEMO_FOLDER, backend=cpu, context=64).close()
    assert torch.equal(cpu.rms_norm(torch.ones(1, 8), torch.ones(8), 0.0), torch.ones(1, 8))


@pytest.mark.usefixtures("cpu")
def test_a_spawned_child_works() -> None:
    expected = product()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(torch.tensor(pool.apply(product)), torch.tensor(expected))


def test_a_copy_of_a_weight_has_addresses_of_its_own(cpu: CpuBackend) -> None:
    """What the backend worked out about a weight's memory must not go along."""
    matrix, x = weight("int4_g32", 40, 64, 1), normal(1, 64, seed=2)
    expected = cpu.linear(x, matrix)
    assert matrix.derived
    copies = [copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))]
    for part in matrix.parts.values():
        part.zero_()
    for other in copies:
        assert torch.equal(cpu.linear(x, other), expected)


def test_torch_is_left_one_thread(cpu: CpuBackend) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        CpuBackend(threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert cpu.threads == allowed_threads()


def test_memory_is_aligned_whether_its_pages_are_large_or_small(cpu: CpuBackend) -> None:
    for nbytes in (0, 1, 1000, 5 << 20):
        memory = cpu.alloc(nbytes)
        assert (memory.nbytes, memory.data_ptr() % 64) == (nbytes, 0)
        memory.fill_(7)
