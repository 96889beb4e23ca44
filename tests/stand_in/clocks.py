"""Streams, events and who comes before whom: vector clocks, so that a race is seen whatever the moment's luck.

Each stream counts its own work. An event remembers what its stream knew then, of itself and of others; waiting for it
adds that to what the waiter knows. An access of bytes must know of every earlier access that it conflicts with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Clock = dict[int, int]


class MisuseError(AssertionError):
    """Something that a real device answers with wrong numbers, now and then."""


def learn(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


@dataclass(frozen=True)
class Access:
    """Bytes [start, stop) of a block, touched by a stream's work number `count`."""

    start: int
    stop: int
    writes: bool
    stream: int
    count: int
    what: str


@dataclass(eq=False)
class Block:
    """One allocation: who touched which bytes of it, as far as that may still matter. While only the compute stream
    (number 0) has touched it, `alone` is when it did last, and whoever uses it sees to that."""

    nbytes: int
    freed: Callable[[int], None]
    accesses: list[Access] = field(default_factory=list)
    alone: int | None = 0

    def __del__(self) -> None:
        self.freed(self.nbytes)

    def touch(self, access: Access, clock: Clock) -> None:
        """Note an access of work that knows `clock`. Raises MisuseError for a race."""
        if self.alone is not None:
            if self.alone:
                self.accesses = [Access(0, self.nbytes, True, 0, self.alone, "an operation")]
            self.alone = None
        kept = []
        for old in self.accesses:
            apart = old.stop <= access.start or access.stop <= old.start
            known = clock.get(old.stream, 0) >= old.count
            if not apart and not known and (old.writes or access.writes):
                raise MisuseError(
                    f"{access.what} on stream {access.stream} {'writes' if access.writes else 'reads'} bytes "
                    f"{access.start} to {access.stop} that {old.what} on stream {old.stream} "
                    f"{'writes' if old.writes else 'reads'}, and no event says which comes first"
                )
            # whoever must know of what comes last has then to know of this as well
            covered = known and access.start <= old.start and old.stop <= access.stop
            if not (covered and (access.writes or (not old.writes and old.stream == access.stream))):
                kept.append(old)
        self.accesses = [*kept, access]


@dataclass(eq=False)
class Stream:
    """Work in order. `late` is what was issued and has not happened: (its count, what to do)."""

    number: int
    clock: Clock = field(default_factory=dict)
    late: list[tuple[int, Callable[[], None]]] = field(default_factory=list)

    def begin(self, known: Clock) -> int:
        """Issue one piece of work, by someone who knows `known`."""
        learn(self.clock, known)
        count = self.clock.get(self.number, 0) + 1
        self.clock[self.number] = count
        return count

    def happen(self, until: int) -> None:
        """Do what is late, in order, up to work number `until`."""
        while self.late and self.late[0][0] <= until:
            _, work = self.late.pop(0)
            work()
