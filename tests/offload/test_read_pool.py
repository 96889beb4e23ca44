"""Demand before speculation: what somebody waits for never stands behind a guess."""

from __future__ import annotations

import threading
from collections.abc import Callable

from k2lite.offload.read_pool import Group, ReadPool


def test_speculation_waits_until_no_demand_is_under_way() -> None:
    pool = ReadPool(3)
    gate, order, lock = threading.Event(), list[str](), threading.Lock()
    over = threading.Semaphore(0)

    def piece(name: str, *, waits: bool = False) -> Callable[[], None]:
        def run() -> None:
            if waits:
                gate.wait(10)
            with lock:
                order.append(name)
            over.release()

        return run

    pool.submit(Group([piece("demand 1", waits=True)], urgent=True))
    guess = Group([piece("guess")], urgent=False)
    hastened = Group([piece("hastened")], urgent=False)
    cancelled = Group([piece("cancelled 1"), piece("cancelled 2")], urgent=False)
    for group in (guess, hastened, cancelled):
        pool.submit(group)
    assert pool.cancel(cancelled) == 2
    assert pool.cancel(cancelled) == 0
    pool.hasten(hastened)
    assert over.acquire(timeout=10)
    pool.submit(Group([piece("demand 2")], urgent=True))
    assert over.acquire(timeout=10)
    assert order == ["hastened", "demand 2"], "two threads are free, and the guess waits all the same"
    gate.set()
    for _ in range(2):
        assert over.acquire(timeout=10)
    assert order[2:] == ["demand 1", "guess"]
    pool.close()
    assert pool.busy_s > 0
