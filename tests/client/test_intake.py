"""The moments at which a connection may end while its worker decides to pause."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pytest
from socketprotector_client import Listener, wait_set, watchdog
from socketprotector_client import intake as intake_module
from socketprotector_client.address import listen
from socketprotector_client.drain_state import Drain
from socketprotector_client.intake import Intake
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.source import ListenSource
from socketprotector_client.wait_set import WaitSet


class Interrupted(WaitSet):
    """Lets something happen right before or right after a removal, once."""

    def __init__(self, act: Callable[[], None], *, before: bool) -> None:
        super().__init__()
        self._acts = [act]
        self._before = before

    def remove(self, fds: Iterable[int]) -> None:
        if self._before and self._acts:
            self._acts.pop()()
        super().remove(fds)
        if self._acts:
            self._acts.pop()()


@pytest.fixture
def source() -> Iterator[ListenSource]:
    one = ListenSource(listen("127.0.0.1:0", 16), handed=False)
    yield one
    one.close()


@pytest.mark.parametrize("take", [0, 32, None])
def test_orders_are_seen_however_many_connections_wait(take: int | None) -> None:
    with Listener("127.0.0.1:0", take=take) as listener:
        listener.listen(64)
        listener.setblocking(False)
        clients = [socket.create_connection(listener.getsockname()) for _ in range(40)]
        intake = listener._opened()
        seen: list[int] = []
        ours, theirs = socket.socketpair()
        listener.accept()[0].close()

        intake.on_readable(ours.fileno(), lambda: seen.append(len(ours.recv(1))))
        theirs.send(b"!")
        taken = 1
        while not seen and taken < 40:
            with suppress(BlockingIOError):
                listener.accept()[0].close()
                taken += 1

        assert taken < 40
        for one in (ours, theirs, *clients):
            one.close()


@pytest.mark.parametrize("before", [True, False])
def test_a_connection_that_ends_while_the_limit_is_being_reached_is_noticed(
    source: ListenSource, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[socket.socket] = []
    waits = Interrupted(lambda: taken.pop().close(), before=before)
    monkeypatch.setattr(intake_module, "WaitSet", lambda: waits)
    intake = Intake(source, Drain(()), 2, {}, Scoreboard(-1, 0))
    with (
        socket.create_connection(source.sockname),
        socket.create_connection(source.sockname),
        socket.create_connection(source.sockname),
    ):
        for _ in range(2):  # the second one reaches the limit, and the first ends
            connection = intake.get(10)
            assert connection is not None
            taken.append(connection)

        third = intake.get(10)

        assert third is not None
        for one in (*taken, third):
            one.close()
    intake.close()


@pytest.mark.parametrize("seconds", [30 * 86_400.0, 999_999_999.0])
def test_a_connection_may_be_waited_for_longer_than_the_kernel_can(
    source: ListenSource, seconds: float
) -> None:
    """epoll_wait(2) takes 24.8 days at most."""
    intake = Intake(source, Drain(()), 2, {}, Scoreboard(-1, 0))
    with socket.create_connection(source.sockname):
        connection = intake.get(seconds)

        assert connection is not None
        connection.close()
    intake.close()


def test_a_wait_that_the_kernel_ends_early_goes_on(
    source: ListenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wait_set, "LONGEST_WAIT_S", 0.001)
    intake = Intake(source, Drain(()), 2, {}, Scoreboard(-1, 0))
    until = time.monotonic() + 0.02

    assert intake.get(0.02) is None
    assert time.monotonic() >= until
    intake.close()


def test_a_watchdog_of_centuries_is_fed() -> None:
    """systemd's infinity is 584,000 years, and sleep() takes 292."""
    assert watchdog.interval_s({"WATCHDOG_USEC": str(2**64 - 1)}) == wait_set.LONGEST_WAIT_S
