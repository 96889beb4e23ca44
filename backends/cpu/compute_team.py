"""The threads that multiply: the caller and helpers that wait beside it. One program runs at a time.

Invariant: a phase's tasks run each exactly once, on whichever thread is free, and are written so that the place changes
no bit. Helpers spin shortly, then sleep in the kernel: a hand-over takes a microsecond or two, where Numba's own
layers take 28 and more and break when two threads use them, fork, or share the cores with torch's OpenMP. A program
gives the interpreter back every quarter of a second, so Ctrl-C is heard. Forked children have no helpers and are
refused. Knows no kernel.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from k2lite.quant.errors import BackendError, RequestError

from .cgroup_quota import cgroup_processors
from .compiler import Kernel, python_callable
from .team_kernels import (
    AT,
    CLOCK,
    FIRST,
    FUTEX,
    FUTEX_NUMBER,
    GRABS,
    SCRATCH,
    SCRATCH_BYTES,
    STATE_BYTES,
    STOP,
    SYSCALL,
    help_along,
    run_program,
)

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


class ComputeTeam:
    """`threads` threads, the caller's among them, each with its own scratch memory. One that is dropped closes."""

    def __init__(self, threads: int | None = None) -> None:
        most = allowed_threads()
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RequestError(f"threads is {threads}; expected 1 to {MAX_THREADS}")
        self.threads = most if threads is None else threads
        if not sys.platform.startswith("linux"):
            self.threads = 1  # helpers sleep by a system call of Linux
        self._lock = threading.RLock()
        memory = np.zeros(STATE_BYTES + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self._state = memory.ctypes.data + start
        self._fields: npt.NDArray[np.int64] = memory[start:][:STATE_BYTES].view(np.int64)
        self._scratch: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._scratch_bytes = 0
        self._room, self._room_at = np.zeros(0, np.uint8), 0
        libc = ctypes.CDLL(None)
        for place, value in (
            (SYSCALL, _address(libc.syscall)),
            (CLOCK, _address(libc.clock_gettime)),
            (GRABS, GRABS_EACH * self.threads),
            (FUTEX, FUTEX_NUMBER.get(platform.machine().lower(), 0)),
        ):
            self._fields[place // 8] = value
        self._run = python_callable("int64(int64, int64, int64, int64)", run_program)
        helpers: list[threading.Thread] = []
        if self.threads > 1:
            helper = python_callable("void(int64, int64)", help_along)
            for member in range(1, self.threads):
                thread = threading.Thread(target=helper, args=(self._state, member), daemon=True, name="k2lite-compute")
                thread.start()
                helpers.append(thread)
        self._end = weakref.finalize(self, _end_helpers, self._lock, helpers, self._fields, self._state, self._run)

    def __enter__(self) -> ComputeTeam:
        """Until the end of the block no other thread takes the team, and `room` is the caller's."""
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def room(self, nbytes: int) -> int:
        """Address of so many bytes, on a page's beginning, for what a program's phases hand to each other. Asked for
        once in a block."""
        if nbytes + 4096 > self._room.nbytes:
            self._room = np.empty(nbytes + 4096, np.uint8)
            self._room_at = -(-self._room.ctypes.data // 4096) * 4096
        return self._room_at

    def run(self, program: Sequence[int], scratch_bytes: int = 0) -> None:
        """Run a program, phases (see `phase`) one behind another, each with so much scratch memory a thread. What
        arguments point at is the caller's to hold."""
        if _forked:
            raise BackendError(
                "the CPU backend was opened before this process was forked, and a forked child has no compute threads; "
                "start children with multiprocessing's 'spawn', or open the backend in the child"
            )
        held = array("q", program)
        at, count = held.buffer_info()
        end, first = at + 8 * count, 0
        with self._lock:
            if not self._end.alive:
                raise BackendError("the CPU backend was closed")
            if scratch_bytes > self._scratch_bytes:
                self._reserve(scratch_bytes)
            while self._run(self._state, at, end, first):
                at, first = int(self._fields[AT // 8]), int(self._fields[FIRST // 8])

    def launch(self, kernel: Kernel, arguments: Sequence[int], tasks: int, scratch_bytes: int = 0) -> None:
        """A program of one phase."""
        self.run(phase(kernel, arguments, tasks), scratch_bytes)

    def close(self) -> None:
        """End the helpers; the team can't be used afterwards."""
        with self._lock:
            self._end()

    def _reserve(self, nbytes: int) -> None:
        """Scratch of at least so many bytes for each thread, on its own pages."""
        each = -(-nbytes // 4096) * 4096
        self._scratch = np.empty(each * self.threads + 4096, np.uint8)
        self._fields[SCRATCH // 8] = -(-self._scratch.ctypes.data // 4096) * 4096
        self._fields[SCRATCH_BYTES // 8] = self._scratch_bytes = each


def phase(kernel: Kernel, arguments: Sequence[int], tasks: int, *, alone: bool = False) -> list[int]:
    """kernel(address of arguments, task, address of scratch) for every task. alone: on the calling thread, for phases
    that are over before a helper has come."""
    return [kernel.address, tasks, alone or tasks == 1, len(arguments), *arguments]


def _end_helpers(
    lock: threading.RLock,
    helpers: list[threading.Thread],
    fields: npt.NDArray[np.int64],
    state: int,
    run: Callable[[int, int, int, int], int],
) -> None:
    """End the helpers. Holds the shared state alive. At the interpreter's exit another thread may be in a job still: it
    ends with the process, as its helpers do."""
    if _forked or not helpers or not lock.acquire(timeout=PATIENCE_S):
        return
    try:
        _stop(helpers, fields, state, run)
    finally:
        lock.release()


def _stop(
    helpers: list[threading.Thread], fields: npt.NDArray[np.int64], state: int, run: Callable[[int, int, int, int], int]
) -> None:
    """Open jobs without tasks until each helper has read in one that it is to stop."""
    fields[STOP // 8] = 1
    nothing = array("q", [0, 0, 0, 0])
    at, count = nothing.buffer_info()
    while any(thread.is_alive() for thread in helpers):
        run(state, at, at + 8 * count, 0)
        time.sleep(0.0001)


MAX_THREADS = 1024
GRABS_EACH = 128  # of a thread in a phase: what it may wait for another at the end
# For a job that another thread has begun, when the interpreter ends.
PATIENCE_S = 5.0


def allowed_threads() -> int:
    """Processors that this process may use: its affinity, and its control group's share of time."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *cgroup_processors()]))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
