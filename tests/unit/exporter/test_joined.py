"""Many clients that ask at once are one question to the instances, and none gets an old answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from socketprotector_exporter.joined import Joined

from tests.running import DEADLINE_S, eventually


class Slow:
    """Makes answers when it may: their numbers, by what was asked for."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may = threading.Semaphore(0)
        self.joined = Joined(self.make)

    def make(self, key: str) -> int:
        self.begun.append(key)
        number = len(self.begun)
        assert self.may.acquire(timeout=DEADLINE_S)
        if key == "fails":
            raise OSError("injected")
        return number


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as made:
        yield made


def test_those_that_come_while_one_is_made_share_the_next(
    slow: Slow, pool: ThreadPoolExecutor
) -> None:
    first = pool.submit(slow.joined.get)
    eventually(lambda: slow.begun == [""], "the first")
    others = [pool.submit(slow.joined.get) for _ in range(30)]
    eventually(lambda: pool._work_queue.empty(), "all of them")
    slow.may.release(3)

    assert first.result(DEADLINE_S) == 1
    # One may come late, after the second was begun.
    assert {each.result(DEADLINE_S) for each in others} <= {2, 3}
    slow.may.release()
    assert slow.joined.get() == len(slow.begun)
    assert slow.joined._runs == {}


def test_one_thing_does_not_wait_for_another(slow: Slow, pool: ThreadPoolExecutor) -> None:
    found = [pool.submit(slow.joined.get, key) for key in ("a", "b")]
    eventually(lambda: sorted(slow.begun) == ["a", "b"], "both")
    slow.may.release(2)

    assert sorted(each.result(DEADLINE_S) for each in found) == [1, 2]


def test_what_fails_fails_for_those_that_share_it_alone(
    slow: Slow, pool: ThreadPoolExecutor
) -> None:
    slow.may.release(4)
    with pytest.raises(OSError, match="injected"):
        slow.joined.get("fails")
    assert slow.joined.get("other") == 2
    assert slow.joined._runs == {}
