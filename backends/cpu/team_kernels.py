"""What the threads of compute_team.py run: a program of phases, a phase's tasks, a helper's life.

A program is 64-bit integers in memory, phase behind phase: kernel, tasks, whether the caller runs them alone, how many
arguments, the arguments. A phase begins when the one before it is done.
The shared state is 64-bit integers at an address. Its word is job number * 65536 + open * 32768 + helpers inside: a
helper enters an open job by adding one, and leaves by taking it off; a job's fields change only while nobody is inside.
Whoever waits spins for some microseconds and then sleeps in the kernel: on a machine that does something else as well,
a thread that spins keeps from the processor just those that it waits for.
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
SYSCALL, FUTEX, CLOCK, AT, FIRST, GRABS = (256 + 8 * i for i in range(6))
TIME, WAITING = 320, 384  # the caller's clock; 1 while the caller sleeps until the helpers have left
STATE_BYTES = 448
PHASE = 4  # integers before a phase's arguments
OPEN, JOB = 1 << 15, 1 << 16
HELPER_SPINS, CALLER_SPINS = 1000, 500
SLICE_NS = 250_000_000
FUTEX_NUMBER = {"x86_64": 202, "amd64": 202, "aarch64": 98}
WAIT, WAKE = 128, 129  # private to the process


@numba.njit(nogil=True, error_model="numpy")
def work(state: int, member: int, end_ns: int) -> int:
    """Take tasks until none is left, or until the time is up; returns the first task that nobody has taken. Of many
    tasks some are taken at once: neighbours read memory that lies together."""
    function, arguments, tasks = get64(state + KERNEL, 0), get64(state + ARGUMENTS, 0), get64(state + TASKS, 0)
    scratch = get64(state + SCRATCH, 0) + member * get64(state + SCRATCH_BYTES, 0)
    clock = get64(state + CLOCK, 0)
    some = max(1, tasks // get64(state + GRABS, 0))
    first = atomic_add(state + COUNTER, some)
    while first < tasks:
        for task in range(first, min(first + some, tasks)):
            call3(function, arguments, task, scratch)
        if end_ns and clock_ns(clock, state + TIME) > end_ns:
            return min(atomic_swap(state + COUNTER, tasks), tasks)
        first = atomic_add(state + COUNTER, some)
    return tasks


@numba.njit(nogil=True, error_model="numpy")
def _leave(state: int) -> None:
    """A helper leaves its job, and wakes the caller if that sleeps until the last one has left."""
    word = atomic_add(state + WORD, -1) - 1
    if not word & (2 * OPEN - 1) and atomic_get(state + WAITING):
        atomic_swap(state + WAITING, 0)
        system_call(get64(state + SYSCALL, 0), get64(state + FUTEX, 0), state + WAITING, WAKE, 1, 0)


def help_along(state: int, member: int) -> None:
    """A helper's life: wait for a job that is open, join it, leave it."""
    seen = 0
    while True:
        spins = 0
        word = atomic_get(state + WORD)
        while (word >> 16) == seen or not word & OPEN:
            spins += 1
            if spins < HELPER_SPINS:
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
                _leave(state)
                return
            work(state, member, 0)
            _leave(state)


@numba.njit(nogil=True, error_model="numpy")
def _run_job(state: int, first: int, end_ns: int) -> int:
    """Open a job at task `first`, work on it, and close it; returns the first task that is still to do."""
    set64(state + COUNTER, first)
    word = atomic_get(state + WORD)
    atomic_swap(state + WORD, ((word >> 16) + 1) * JOB + OPEN)
    if atomic_get(state + SLEEPERS) > 0:
        system_call(get64(state + SYSCALL, 0), get64(state + FUTEX, 0), state + WORD, WAKE, 1 << 20, 0)
    following = work(state, 0, end_ns)
    inside, spins = (atomic_add(state + WORD, -OPEN) - OPEN) & (OPEN - 1), 0
    while inside:
        spins += 1
        if spins < CALLER_SPINS:
            pause()
        else:
            atomic_swap(state + WAITING, 1)
            if atomic_get(state + WORD) & (OPEN - 1):
                system_call(get64(state + SYSCALL, 0), get64(state + FUTEX, 0), state + WAITING, WAIT, 1, 0)
            atomic_swap(state + WAITING, 0)
        inside = atomic_get(state + WORD) & (OPEN - 1)
    return following


def run_program(state: int, at: int, end: int, first: int) -> int:
    """Run the phases between two addresses, the first one from task `first` on. Returns 1 when the time was up before
    the end: then the state's AT and FIRST say where to go on."""
    end_ns = clock_ns(get64(state + CLOCK, 0), state + TIME) + SLICE_NS
    while at < end:
        kernel, tasks, arguments = get64(at, 0), get64(at, 1), at + 8 * PHASE
        if get64(at, 2):
            for task in range(first, tasks):
                call3(kernel, arguments, task, get64(state + SCRATCH, 0))
        else:
            set64(state + KERNEL, kernel)
            set64(state + ARGUMENTS, arguments)
            set64(state + TASKS, tasks)
            first = _run_job(state, first, end_ns)
            if first < tasks:
                set64(state + AT, at)
                set64(state + FIRST, first)
                return 1
        first = 0
        at = arguments + 8 * get64(at, 3)
    return 0
