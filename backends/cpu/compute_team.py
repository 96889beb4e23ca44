"""The threads that multiply: the caller and helpers that wait beside it. One job runs at a time.

Invariant: a job's tasks run each exactly once, on whichever thread is free, and are written so that the place changes
no bit. Helpers spin shortly, then sleep in the kernel: a hand-over takes about five microseconds, where
Numba's own layers take 28 and more and break when two threads use them, fork, or share the cores with torch's OpenMP.
A job gives the interpreter back every quarter of a second, so Ctrl-C is heard. Forked children have no helpers and are
refused. Knows no kernel.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from k2lite.quant.errors import BackendError, RequestError

from .cgroup_quota import cgroup_processors
from .compiler import Kernel, python_callable
from .team_kernels import (
    ARGUMENTS,
    CLOCK,
    FUTEX,
    FUTEX_NUMBER,
    KERNEL,
    SCRATCH,
    SCRATCH_BYTES,
    STATE_BYTES,
    STOP,
    SYSCALL,
    TASKS,
    help_along,
    run_job,
)

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


class ComputeTeam:
    """`threads` threads, the caller's among them, each with its own scratch memory."""

    def __init__(self, threads: int | None = None) -> None:
        most = allowed_threads()
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RequestError(f"threads is {threads}; expected 1 to {MAX_THREADS}")
        self.threads = most if threads is None else threads
        if not sys.platform.startswith("linux"):
            self.threads = 1  # helpers sleep by a system call of Linux
        self._lock = threading.Lock()
        self._memory = np.zeros(STATE_BYTES + 64, np.uint8)
        self._state = -(-self._memory.ctypes.data // 64) * 64
        self._fields: npt.NDArray[np.int64] = self._memory[self._state - self._memory.ctypes.data :][:STATE_BYTES].view(
            np.int64
        )
        self._scratch: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        libc = ctypes.CDLL(None)
        self._set(SYSCALL, _address(libc.syscall))
        self._set(CLOCK, _address(libc.clock_gettime))
        self._set(FUTEX, FUTEX_NUMBER.get(platform.machine().lower(), 0))
        self._run = python_callable("int64(int64, int64)", run_job)
        self._helpers: list[threading.Thread] = []
        if self.threads > 1:
            helper = python_callable("void(int64, int64)", help_along)
            for member in range(1, self.threads):
                thread = threading.Thread(target=helper, args=(self._state, member), daemon=True, name="k2lite-compute")
                thread.start()
                self._helpers.append(thread)
        atexit.register(self.close)

    def launch(self, kernel: Kernel, arguments: Sequence[int], tasks: int, scratch_bytes: int = 0) -> None:
        """Run kernel(address of arguments, task, address of scratch) for every task. What the arguments point at is
        the caller's to hold."""
        if _forked:
            raise BackendError(
                "the CPU backend was opened before this process was forked, and a forked child has no compute threads; "
                "start children with multiprocessing's 'spawn', or open the backend in the child"
            )
        if not tasks:
            return
        held = np.array(arguments, np.int64)
        with self._lock:
            self._reserve(scratch_bytes)
            self._set(KERNEL, kernel.address)
            self._set(ARGUMENTS, held.ctypes.data)
            self._set(TASKS, tasks)
            first = 0
            while first < tasks:
                first = self._run(self._state, first)

    def close(self) -> None:
        """End the helpers; the team can't be used afterwards."""
        atexit.unregister(self.close)
        if _forked or not self._helpers:
            return
        with self._lock:
            self._set(STOP, 1)
            self._set(TASKS, 0)
            while any(thread.is_alive() for thread in self._helpers):
                self._run(self._state, 0)
                time.sleep(0.0001)
            self._helpers = []

    def _set(self, offset: int, value: int) -> None:
        self._fields[offset // 8] = value

    def _reserve(self, nbytes: int) -> None:
        """Scratch of at least so many bytes for each thread, on its own pages."""
        each = -(-nbytes // 4096) * 4096
        if each * self.threads + 4096 > self._scratch.nbytes:
            self._scratch = np.empty(each * self.threads + 4096, np.uint8)
            self._set(SCRATCH, -(-self._scratch.ctypes.data // 4096) * 4096)
            self._set(SCRATCH_BYTES, each)


MAX_THREADS = 1024


def allowed_threads() -> int:
    """Processors that this process may use: its affinity, and its control group's share of time."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *cgroup_processors()]))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
