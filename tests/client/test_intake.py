"""An intake in one process: when it takes a connection, when it pauses, how long it waits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import pytest
from socketprotector_client import Listener, wait_set, watchdog
from socketprotector_client import intake as intake_module
from socketprotector_client.address import listen
from socketprotector_client.connection import Connection
from socketprotector_client.drain_state import Drain
from socketprotector_client.errors import Drained
from socketprotector_client.intake import Intake
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.source import ListenSource
from socketprotector_client.wait_set import WaitSet

from .sharing import connect, in_child, serving, taken


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


# -- several listeners --------------------------------------------------------------------------


@contextmanager
def serving_two() -> Iterator[Intake]:
    listeners = [*listen("127.0.0.1:0", 16), *listen("127.0.0.1:0", 16)]
    with serving(ListenSource(listeners, handed=False)) as intake:
        yield intake


@pytest.fixture
def two() -> Iterator[Intake]:
    """Return an intake of two listeners."""
    with serving_two() as intake:
        yield intake


def test_a_row_takes_from_all_listeners(two: Intake) -> None:
    with connect(two, 1), connect(two, 1), connect(two, 0), ExitStack() as row:
        listeners = set()
        for get in (two.get_now, two.get_next, two.get_next):
            connection = get()
            assert connection is not None
            listeners.add(row.enter_context(connection).listener)

        assert len(listeners) == 2
        assert two.get_next() is None


def test_a_client_of_one_listener_is_found_though_the_other_ones_was_taken_meanwhile(
    two: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may accept from the same listener."""
    take = two.source.take

    def taken_by_another_process(fd: int) -> Connection | None:
        if fd == two.source.fds[0]:
            other = take(fd)
            assert other is not None
            other.close()
        return take(fd)

    monkeypatch.setattr(two.source, "take", taken_by_another_process)
    with connect(two, 0), connect(two, 1):
        connection = two.get_now()

        assert connection is not None
        connection.close()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("inherits", [False, True])
def test_a_file_with_the_number_of_a_standard_stream_is_watched_as_any_other(
    two: Intake, number: int, inherits: bool
) -> None:
    """A program may have closed its standard streams before it opens other files."""

    def is_seen(intake: Intake) -> bool:
        ours, theirs = socket.socketpair()
        silent, _other = socket.socketpair()
        os.dup2(ours.fileno(), number)
        seen: list[bytes] = []
        intake.on_readable(number, lambda: seen.append(os.read(number, 1)))
        intake.sleep_beside(silent.fileno())
        theirs.send(b"!")
        return intake.sleep(0) == (True, False) and intake.get_now() is None and seen == [b"!"]

    def act() -> bool:
        with serving_two() as made:
            return is_seen(two if inherits else made)

    in_child(act)


# -- the limit and the drain --------------------------------------------------------------------


def test_a_worker_at_its_limit_sleeps_until_a_connection_is_closed(
    intake: Intake, timers: list[Callable[[], None]]
) -> None:
    with taken(intake) as first, connect(intake):
        copies = [first.dup() for _ in range(2)]  # these count, too
        assert intake.get_now() is None
        assert not intake.has_more()

        for copy in copies:
            copy.close()
        second = intake.get_now()
        assert second is not None
        with second, connect(intake):
            assert not intake.has_more()
    assert timers == []


def test_a_worker_that_reaches_a_high_limit_pauses_at_once(source: ListenSource) -> None:
    with serving(source, limit=300) as intake, ExitStack() as opened:
        first = opened.enter_context(taken(intake))
        for _ in range(298):
            opened.enter_context(first.dup())
        opened.enter_context(taken(intake))

        with connect(intake):
            assert not intake.has_more()


def test_a_row_goes_on_once_a_connection_is_closed_at_the_limit() -> None:
    with Listener("127.0.0.1:0", limit=1, take=3) as listener:
        listener.listen()
        listener.setblocking(False)
        address = listener.getsockname()
        with socket.create_connection(address), socket.create_connection(address):
            listener.accept()[0].close()

            listener.accept()[0].close()


def test_a_listener_that_becomes_non_blocking_begins_a_row() -> None:
    with Listener("127.0.0.1:0", take=3) as listener:
        listener.listen()
        address = listener.getsockname()
        with socket.create_connection(address), socket.create_connection(address):
            listener.accept()[0].close()
            listener.setblocking(False)

            listener.accept()[0].close()


def end_channel(intake: Intake) -> None:
    """Let the source find the end of its channel."""

    def take(fd: int) -> Connection:
        raise Drained

    intake.source.take = take  # type: ignore[method-assign]


@pytest.mark.parametrize("end", [Intake.request_drain, Intake.drained, end_channel])
def test_the_drain_ends_a_row(source: ListenSource, end: Callable[[Intake], None]) -> None:
    with serving(source) as intake, connect(intake), connect(intake):
        connection = intake.get_now()
        assert connection is not None

        end(intake)

        with connection, pytest.raises(Drained):
            intake.get_next()


@pytest.mark.parametrize("get", [Intake.get, Intake.get_now])
def test_after_a_request_to_drain_no_client_that_waits_is_taken(
    intake: Intake, get: Callable[[Intake], Connection | None]
) -> None:
    with connect(intake):
        intake.request_drain()

        with pytest.raises(Drained):
            get(intake)


def test_the_last_connection_of_a_drain_is_announced_when_it_is_closed(intake: Intake) -> None:
    with taken(intake):
        with taken(intake):
            intake.end()
            intake.await_last()
        assert not intake.has_more()

    assert intake.has_more()


def test_a_pool_leaves_a_channel_alone_that_has_ended(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel stays open, and readable for ever."""
    intake.share()
    end_channel(intake)
    with monkeypatch.context() as patch, connect(intake):
        patch.setattr(intake.source, "close", lambda: None)
        with pytest.raises(Drained):
            intake.get()

        intake.waits.hush()
        assert not intake.has_more()
    intake.source.close()


@pytest.mark.parametrize("stale", [0, 99])
def test_a_thread_of_a_pool_does_not_wait_again_with_its_turn(
    intake: Intake, monkeypatch: pytest.MonkeyPatch, stale: int
) -> None:
    """Another thread may have carried out the action for which this one woke."""
    (channel,) = intake.source.fds
    woken = iter([[stale], [], [channel]])
    waited_s: list[float | None] = []

    def wait(timeout_s: float | None) -> list[int]:
        waited_s.append(timeout_s)
        return next(woken)

    intake.share()
    monkeypatch.setattr(intake.waits, "wait", wait)
    with connect(intake):
        connection = intake.get()

    assert connection is not None
    connection.close()
    assert waited_s == [None, 0, None]


def test_a_pool_may_be_silent_only_while_none_of_its_threads_waits(source: ListenSource) -> None:
    with serving(source) as intake:
        assert not intake.may_be_silent
        intake.share()
        assert intake.may_be_silent
        with intake._turn:  # as held by the thread that waits
            assert not intake.may_be_silent
        intake.end()
        assert intake.may_be_silent


def test_a_program_may_exit_before_its_last_connection_is_closed() -> None:
    """No event announces the end of a detached connection, so a thread looks for it."""
    code = """if True:
        import socket
        from socketprotector_client import Listener

        listener = Listener("127.0.0.1:0")
        client = socket.create_connection(listener.getsockname())
        listener.accept()[0].detach()
        listener._intake.end()
        listener._intake.await_last()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("drains", [False, True])
def test_a_child_leaves_its_parents_epoll_alone_before_it_has_its_own(
    intake: Intake, monkeypatch: pytest.MonkeyPatch, difference: int, drains: bool
) -> None:
    """The garbage collector may close a connection right after the fork."""
    child = os.getpid() + difference
    with taken(intake), taken(intake), connect(intake):
        if drains:
            intake.end()
            intake.await_last()
        monkeypatch.setattr(os, "getpid", lambda: child)
    monkeypatch.undo()

    assert not intake.has_more()


# -- how long it waits --------------------------------------------------------------------------


def test_a_wait_that_finds_nothing_goes_on_for_the_rest_of_the_time(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, waited_s = 1000.0, []

    def wait(timeout_s: float) -> list[int]:
        nonlocal now_s
        assert now_s < 1050, "it waits for ever"
        waited_s.append(timeout_s)
        now_s += 3
        return []

    monkeypatch.setattr(intake_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(intake.waits, "wait", wait)

    assert intake.get(9) is None
    assert waited_s == [9, 6, 3]


def test_a_call_without_a_timeout_waits_for_its_turn_however_long(intake: Intake) -> None:
    class LongHeld:
        """The lock of a thread that waits for longer than any timeout."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self.release = self._lock.release

        def acquire(self, *, timeout: float) -> bool:
            return timeout < 0 and self._lock.acquire(timeout=timeout)

    intake._turn = LongHeld()  # type: ignore[assignment]
    with connect(intake):
        assert intake.get(1) is None
        connection = intake.get()

        assert connection is not None
        connection.close()


@pytest.mark.parametrize("get", [Intake.get_now, Intake.get_next])
def test_a_call_that_must_not_wait_does_not_wait_for_its_turn(
    intake: Intake, get: Callable[[Intake], Connection | None]
) -> None:
    class Held:
        """The lock of a thread that waits."""

        def acquire(self, blocking: bool) -> bool:
            assert not blocking
            return False

    intake._turn = Held()  # type: ignore[assignment]
    with connect(intake):
        assert get(intake) is None


def test_a_look_for_more_clients_does_not_wait(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited_s: list[float] = []

    def wait(timeout_s: float) -> list[int]:
        waited_s.append(timeout_s)
        return []

    monkeypatch.setattr(intake.waits, "wait", wait)

    assert not intake.has_more()
    assert intake.get_now() is None
    assert waited_s == [0, 0]
