"""Reading ahead: in order, several at once, no further than asked, errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from k2lite.quant.read_ahead import read_ahead


def test_several_are_worked_on_at_once_and_come_in_their_order() -> None:
    """Each waits for the one behind it, so that one thread alone would never end."""
    begun = [threading.Event() for _ in range(9)]

    def work(item: int) -> int:
        begun[item].set()
        assert item % 2 or begun[item + 1].wait(60)
        return item

    with ThreadPoolExecutor(2) as workers:
        assert list(read_ahead(range(8), work, 4, workers)) == list(range(8))


def test_no_more_are_begun_than_asked_for() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(20):
            taken += 1
            yield item

    with ThreadPoolExecutor(2) as workers:
        for done, item in enumerate(read_ahead(items(), lambda item: item, 3, workers)):
            assert item == done
            assert taken == min(20, done + 1 + 3)


def test_an_error_is_raised_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError(item)
        return item

    with ThreadPoolExecutor(2) as workers:
        results = read_ahead(range(8), work, 8, workers)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="3"):
            next(results)
