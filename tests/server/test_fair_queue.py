"""Clients take turns: against the order that the rule gives by hand, and nobody has two while another waits."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given, strategies as st

from k2lite.server.answering import Job
from k2lite.server.fair_queue import FairQueue


def job(client: str) -> Job:
    return Job(cast(Any, None), lambda _: None, client)


def order(queue: FairQueue, running: list[str]) -> str:
    """Who gets one slot after another."""
    taken = ""
    while next_jobs := queue.take(1, running):
        taken += next_jobs[0].client
    return taken


def test_one_slot_goes_around() -> None:
    queue = FairQueue(100)
    for client in "AAAABBC":
        assert queue.add(job(client), 0)
    assert order(queue, []) == "ABCABAA"


def test_who_has_fewest_slots_is_next() -> None:
    queue = FairQueue(100)
    for client in "AAABBC":
        queue.add(job(client), 0)
    assert [taken.client for taken in queue.take(3, ["A", "A"])] == ["B", "C", "B"]


def test_a_late_client_waits_for_one_turn_only() -> None:
    queue = FairQueue(100)
    for _ in range(50):
        queue.add(job("A"), 0)
    queue.take(4, [])
    queue.add(job("B"), 0)
    assert queue.take(1, ["A", "A", "A"])[0].client == "B"


def test_new_clients_do_not_pass_who_waits() -> None:
    """On one machine a client is made by naming another key."""
    queue = FairQueue(1000)
    queue.add(job("A"), 0)
    queue.add(job("A"), 0)
    assert queue.take(1, [])[0].client == "A"
    served = []
    for number in range(5):
        queue.add(job(f"new {number}"), 0)
        served += [taken.client for taken in queue.take(1, [])]
    assert served[0] == "A"


def test_places_are_kept_for_others_and_the_limit_holds() -> None:
    queue = FairQueue(8)
    assert [queue.add(job("A"), 0) for _ in range(8)] == [True] * 6 + [False] * 2
    assert [queue.add(job(client), 0) for client in "BCD"] == [True, True, False]
    assert FairQueue(0).add(job("A"), 1)
    assert not FairQueue(0).add(job("A"), 0)


@given(st.lists(st.sampled_from("ABCD"), max_size=40))
def test_nobody_has_two_turns_while_another_waits(clients: list[str]) -> None:
    queue = FairQueue(100)
    jobs = [job(client) for client in clients]
    for waiting in jobs:
        queue.add(waiting, 0)
    taken: list[Job] = []
    while next_jobs := queue.take(1, []):
        left = {waiting.client for waiting in queue.jobs}
        assert not taken or taken[-1].client != next_jobs[0].client or left <= {next_jobs[0].client}
        taken += next_jobs
    for client in "ABCD":  # each client's own requests keep their order
        assert [one for one in taken if one.client == client] == [one for one in jobs if one.client == client]


def test_cancelled_jobs_leave() -> None:
    queue = FairQueue(8)
    gone = job("A")
    queue.add(gone, 0)
    queue.add(job("B"), 0)
    gone.cancelled = True
    assert queue.drop_cancelled() == 1
    assert order(queue, []) == "B"
