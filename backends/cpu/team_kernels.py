"""What the threads of compute_team.py run: a job's tasks, a helper's life, and a job from opening to closing.

The shared state is 64-bit integers at an address. Its word is job number * 65536 + open * 32768 + helpers inside: a
helper enters an open job by adding one, and leaves by taking it off; a job's fields change only while nobody is inside.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

import numba

from .pointers import (
    atomic_add,
    atomic_get,
    atomic_replace,
    atomic_swap,
    call3,
    clock_ns,
    get64,
    pause,
    set64,
    system_call,
)

# Offsets in bytes of the shared state; what different threads write lies on different cache lines.
WORD, SLEEPERS, COUNTER = 0, 64, 128
KERNEL, ARGUMENTS, TASKS, SCRATCH, SCRATCH_BYTES, STOP = (192 + 8 * i for i in range(6))
SYSCALL, FUTEX, CLOCK = (256 + 8 * i for i in range(3))
TIME = 320
STATE_BYTES = 384
OPEN, JOB = 1 << 15, 1 << 16
SPINS = 1500
SLICE_NS = 250_000_000
FUTEX_NUMBER = {"x86_64": 202, "amd64": 202, "aarch64": 98}
WAIT, WAKE = 128, 129  # private to the process


@numba.njit(nogil=True, error_model="numpy")
def work(state: int, member: int, limit_ns: int) -> int:
    """Take tasks until none is left, or until the time is up; returns the first task that nobody has taken."""
    function, arguments, tasks = get64(state + KERNEL, 0), get64(state + ARGUMENTS, 0), get64(state + TASKS, 0)
    scratch = get64(state + SCRATCH, 0) + member * get64(state + SCRATCH_BYTES, 0)
    clock = get64(state + CLOCK, 0)
    end = clock_ns(clock, state + TIME) + limit_ns if limit_ns else 0
    task = atomic_add(state + COUNTER, 1)
    while task < tasks:
        call3(function, arguments, task, scratch)
        if limit_ns and clock_ns(clock, state + TIME) > end:
            return min(atomic_swap(state + COUNTER, tasks), tasks)
        task = atomic_add(state + COUNTER, 1)
    return tasks


def help_along(state: int, member: int) -> None:
    """A helper's life: wait for a job that is open, join it, leave it."""
    seen = 0
    while True:
        spins = 0
        word = atomic_get(state + WORD)
        while (word >> 16) == seen or not word & OPEN:
            spins += 1
            if spins < SPINS:
                pause()
            else:
                atomic_add(state + SLEEPERS, 1)
                word = atomic_get(state + WORD)
                if (word >> 16) == seen or not word & OPEN:
                    low = word & 0xFFFFFFFF
                    system_call(get64(state + SYSCALL, 0), get64(state + FUTEX, 0), state + WORD, WAIT, low, 0)
                atomic_add(state + SLEEPERS, -1)
            word = atomic_get(state + WORD)
        if atomic_replace(state + WORD, word, word + 1):
            seen = word >> 16
            if get64(state + STOP, 0):
                atomic_add(state + WORD, -1)
                return
            work(state, member, 0)
            atomic_add(state + WORD, -1)


def run_job(state: int, first: int) -> int:
    """Open a job at task `first`, work on it, and close it; returns the first task that is still to do."""
    set64(state + COUNTER, first)
    word = atomic_get(state + WORD)
    atomic_swap(state + WORD, ((word >> 16) + 1) * JOB + OPEN)
    if atomic_get(state + SLEEPERS) > 0:
        system_call(get64(state + SYSCALL, 0), get64(state + FUTEX, 0), state + WORD, WAKE, 1 << 20, 0)
    following = work(state, 0, SLICE_NS)
    atomic_add(state + WORD, -OPEN)
    while atomic_get(state + WORD) & (OPEN - 1):
        pause()
    return following
