"""The governor turns prefetch down when its reads are wasted, off when most are, and tries again."""

from __future__ import annotations

from k2lite.offload.governor import PROBE_TOKENS, WINDOW_TOKENS, PrefetchGovernor
from k2lite.offload.source import PrefetchCounters


def run(governor: PrefetchGovernor, counters: PrefetchCounters, *, tokens: int, precision: float) -> int:
    for _ in range(tokens):
        counters.issued += 10
        counters.useful += round(10 * precision)
        governor.token_over()
    return governor.width


def test_wasted_reads_switch_it_off_and_a_probe_tries_again() -> None:
    counters = PrefetchCounters()
    governor = PrefetchGovernor(6, counters)
    assert run(governor, counters, tokens=WINDOW_TOKENS, precision=0.5) == 3
    assert run(governor, counters, tokens=WINDOW_TOKENS, precision=0.1) == 1
    assert run(governor, counters, tokens=WINDOW_TOKENS, precision=0.1) == 0
    for _ in range(PROBE_TOKENS - 1):
        governor.token_over()
    assert governor.width == 0
    governor.token_over()
    assert governor.width == 1
    assert run(governor, counters, tokens=3 * WINDOW_TOKENS, precision=0.9) == 4
    assert run(governor, counters, tokens=WINDOW_TOKENS, precision=0.7) == 4
    assert run(governor, counters, tokens=9 * WINDOW_TOKENS, precision=0.9) == 6


def test_off_stays_off() -> None:
    governor = PrefetchGovernor(0, PrefetchCounters())
    for _ in range(2 * PROBE_TOKENS):
        governor.token_over()
    assert governor.width == 0


def test_late_guesses_were_right() -> None:
    counters = PrefetchCounters()
    governor = PrefetchGovernor(2, counters)
    for _ in range(WINDOW_TOKENS):
        counters.issued += 1
        counters.late += 1
        governor.token_over()
    assert governor.width == 2
