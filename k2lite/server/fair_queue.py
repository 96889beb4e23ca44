"""Who is next: clients take turns, so that one with many requests waiting keeps nobody else from a slot.

Invariant: a client's own requests keep their order. Not safe for threads by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from .answering import Job

KEPT_FOR_OTHERS = 4  # one in so many places is for clients that have nothing waiting


class FairQueue:
    """Up to `limit` jobs that wait, beside those for which a slot is free."""

    def __init__(self, limit: int) -> None:
        self.jobs: list[Job] = []
        self._limit = limit
        self._turns: dict[str, int] = {}  # when each client that waits or runs had its last turn
        self._now = 0

    def add(self, job: Job, free_slots: int) -> bool:
        """False if there is no place for this client."""
        places = self._limit + max(free_slots, 0)
        if any(waiting.client == job.client for waiting in self.jobs):
            places -= self._limit // KEPT_FOR_OTHERS
        if len(self.jobs) >= places:
            return False
        self._turns.setdefault(job.client, self._now)  # a new client comes behind who waits already
        self.jobs.append(job)
        return True

    def take(self, count: int, running: Sequence[str]) -> list[Job]:
        """The next jobs, at most `count`: each of the client with the fewest in slots, then of who has waited longest
        for a turn. `running` names the client of each slot in use."""
        busy = list(running)
        taken: list[Job] = []
        while self.jobs and len(taken) < count:
            job = min(self.jobs, key=lambda job: (busy.count(job.client), self._turns.get(job.client, 0)))
            self.jobs.remove(job)
            busy.append(job.client)
            taken.append(job)
            self._now += 1
            self._turns[job.client] = self._now
        known = {*busy, *(job.client for job in self.jobs)}
        self._turns = {client: turn for client, turn in self._turns.items() if client in known}
        return taken

    def drop_cancelled(self) -> int:
        """How many were dropped."""
        before = len(self.jobs)
        self.jobs = [job for job in self.jobs if not job.cancelled]
        return before - len(self.jobs)
