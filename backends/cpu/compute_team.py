"""The threads that multiply: the caller and helpers that wait beside it. One job runs at a time.

Invariant: a job's tasks run each exactly once, on whichever thread is free, and are written so that the place changes
no bit. Helpers spin shortly, then sleep in the kernel: handing a job over takes about two microseconds, where Numba's
own layers take 4 to 30 and break when two threads use them, fork, or share the cores with torch's OpenMP. A job gives
the interpreter back every quarter of a second, so Ctrl-C is heard. Forked children have no helpers and are refused.
Knows no kernel.
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

import numba
import numpy as np
import numpy.typing as npt

from k2lite.quant.errors import BackendError, RequestError

from .cgroup_quota import cgroup_processors
from .compiler import Kernel, python_callable
from .pointers import atomic_add, atomic_get, atomic_replace, atomic_swap, call3, clock_ns, get64, pause, set64, system_call

# Offsets in bytes of the shared state; what different threads write lies on different cache lines.
_WORD, _SLEEPERS, _COUNTER = 0, 64, 128
_KERNEL, _ARGUMENTS, _TASKS, _SCRATCH, _SCRATCH_BYTES, _STOP = (192 + 8 * i for i in range(6))
_SYSCALL, _FUTEX, _CLOCK = (256 + 8 * i for i in range(3))
_TIME = 320
_STATE_BYTES = 384
# The word: job number * 65536 + open * 32768 + helpers inside.
_OPEN, _JOB = 1 << 15, 1 << 16
_SPINS = 1500
_SLICE_NS = 250_000_000
_FUTEX_NUMBER = {"x86_64": 202, "amd64": 202, "aarch64": 98}
_WAIT, _WAKE = 128, 129  # private to the process


def _work(state: int, member: int, limit_ns: int) -> int:
    """Take tasks until none is left, or until the time is up; returns the first task that nobody has taken."""
    function, arguments, tasks = get64(state + _KERNEL, 0), get64(state + _ARGUMENTS, 0), get64(state + _TASKS, 0)
    scratch = get64(state + _SCRATCH, 0) + member * get64(state + _SCRATCH_BYTES, 0)
    clock = get64(state + _CLOCK, 0)
    end = clock_ns(clock, state + _TIME) + limit_ns if limit_ns else 0
    task = atomic_add(state + _COUNTER, 1)
    while task < tasks:
        call3(function, arguments, task, scratch)
        if limit_ns and clock_ns(clock, state + _TIME) > end:
            return min(atomic_swap(state + _COUNTER, tasks), tasks)
        task = atomic_add(state + _COUNTER, 1)
    return tasks


def _help(state: int, member: int) -> None:
    """A helper's life: wait for a job that is open, join it, leave it."""
    seen = 0
    while True:
        spins = 0
        word = atomic_get(state + _WORD)
        while (word >> 16) == seen or not word & _OPEN:
            spins += 1
            if spins < _SPINS:
                pause()
            else:
                atomic_add(state + _SLEEPERS, 1)
                word = atomic_get(state + _WORD)
                if (word >> 16) == seen or not word & _OPEN:
                    low = word & 0xFFFFFFFF
                    system_call(get64(state + _SYSCALL, 0), get64(state + _FUTEX, 0), state + _WORD, _WAIT, low, 0)
                atomic_add(state + _SLEEPERS, -1)
            word = atomic_get(state + _WORD)
        if atomic_replace(state + _WORD, word, word + 1):
            seen = word >> 16
            if get64(state + _STOP, 0):
                atomic_add(state + _WORD, -1)
                return
            _WORK(state, member, 0)
            atomic_add(state + _WORD, -1)


def _run(state: int, first: int) -> int:
    """Open a job at task `first`, work on it, and close it; returns the first task that is still to do."""
    set64(state + _COUNTER, first)
    word = atomic_get(state + _WORD)
    atomic_swap(state + _WORD, ((word >> 16) + 1) * _JOB + _OPEN)
    if atomic_get(state + _SLEEPERS) > 0:
        system_call(get64(state + _SYSCALL, 0), get64(state + _FUTEX, 0), state + _WORD, _WAKE, 1 << 20, 0)
    following = _WORK(state, 0, _SLICE_NS)
    atomic_add(state + _WORD, -_OPEN)
    while atomic_get(state + _WORD) & (_OPEN - 1):
        pause()
    return following


# the two above see it as a compiled function
_WORK: Any = numba.njit(_work, nogil=True, error_model="numpy")

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
        self._memory = np.zeros(_STATE_BYTES + 64, np.uint8)
        self._state = -(-self._memory.ctypes.data // 64) * 64
        self._fields: npt.NDArray[np.int64] = self._memory[self._state - self._memory.ctypes.data :][
            :_STATE_BYTES
        ].view(np.int64)
        self._scratch: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        libc = ctypes.CDLL(None)
        self._set(_SYSCALL, _address(libc.syscall))
        self._set(_CLOCK, _address(libc.clock_gettime))
        self._set(_FUTEX, _FUTEX_NUMBER.get(platform.machine().lower(), 0))
        self._run = python_callable("int64(int64, int64)", _run)
        self._helpers: list[threading.Thread] = []
        if self.threads > 1:
            helper = python_callable("void(int64, int64)", _help)
            for member in range(1, self.threads):
                thread = threading.Thread(target=helper, args=(self._state, member), daemon=True, name="k2lite-compute")
                thread.start()
                self._helpers.append(thread)
        atexit.register(self.close)

    def launch(
        self, kernel: Kernel, arguments: Sequence[int], tasks: int, scratch_bytes: int = 0, keep: object = None
    ) -> None:
        """Run kernel(address of arguments, task, address of scratch) for every task. `keep` is held meanwhile: what
        the arguments point at."""
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
            self._set(_KERNEL, kernel.address)
            self._set(_ARGUMENTS, held.ctypes.data)
            self._set(_TASKS, tasks)
            first = 0
            while first < tasks:
                first = self._run(self._state, first)
        del keep

    def close(self) -> None:
        """End the helpers; the team can't be used afterwards."""
        atexit.unregister(self.close)
        if _forked or not self._helpers:
            return
        with self._lock:
            self._set(_STOP, 1)
            self._set(_TASKS, 0)
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
            self._set(_SCRATCH, -(-self._scratch.ctypes.data // 4096) * 4096)
            self._set(_SCRATCH_BYTES, each)


MAX_THREADS = 1024


def allowed_threads() -> int:
    """Processors that this process may use: its affinity, and its control group's share of time."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *cgroup_processors()]))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
