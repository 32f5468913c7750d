"""Intakes, each of which accepts from a listener of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from socketprotector_client.address import listen
from socketprotector_client.drain_state import Drain
from socketprotector_client.intake import Intake
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.source import ListenSource


class _WakesOne(ListenSource):
    """Makes the kernel wake one waiter, as a channel does."""

    wakes_one = True


@pytest.fixture
def make_intake() -> Iterator[Callable[[], Intake]]:
    made: list[Intake] = []

    def make() -> Intake:
        source = _WakesOne(listen("127.0.0.1:0", 16), handed=False)
        made.append(Intake(source, Drain(()), 2, {}, Scoreboard(-1, 0)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def intake(make_intake: Callable[[], Intake]) -> Intake:
    return make_intake()


@pytest.fixture
def source() -> Iterator[ListenSource]:
    one = ListenSource(listen("127.0.0.1:0", 16), handed=False)
    yield one
    one.close()


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Hold timers back; return the list of what they would call."""
    held: list[Callable[[], None]] = []

    class Timer:
        def __init__(self, interval: float, function: Callable[[], None]) -> None:
            self._function = function

        def start(self) -> None:
            held.append(self._function)

    monkeypatch.setattr(threading, "Timer", Timer)
    return held
