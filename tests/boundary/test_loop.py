"""The loop: descriptors, timers, signals, and no wake-up for nothing."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator

import pytest

from socketprotector.system import loop as loop_module
from socketprotector.system.loop import READ, WRITE, Loop
from tests.boundary.conftest import Turns


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    receive, send = os.pipe2(os.O_NONBLOCK)
    yield receive, send
    os.close(receive)
    os.close(send)


def stop(loop: Loop) -> None:
    loop.running = False


def test_a_descriptor_that_is_ready_calls_back_until_it_is_unwatched(
    loop: Loop, pipe: tuple[int, int]
) -> None:
    receive, send = pipe
    called: list[bytes] = []

    def read() -> None:
        called.append(os.read(receive, 1))
        if len(called) == 3:
            loop.unwatch(receive)
            loop.call_after("end", 0, lambda: stop(loop))

    os.write(send, b"abcd")
    loop.watch(receive, read, READ)

    loop.run()

    assert called == [b"a", b"b", b"c"]
    loop.unwatch(receive)  # once more changes nothing


def test_a_descriptor_unwatched_by_another_callback_of_the_same_wake_up_is_not_called(
    loop: Loop, pipe: tuple[int, int]
) -> None:
    receive, send = pipe
    os.write(send, b"a")
    called = []

    def either() -> None:
        called.append(1)
        loop.unwatch(receive)
        loop.unwatch(send)
        stop(loop)

    loop.watch(receive, either, READ)
    loop.watch(send, either, WRITE)

    loop.run()

    assert called == [1]


def test_a_number_that_is_used_again_gets_no_event_of_what_had_it_before(loop: Loop) -> None:
    """Both are found ready by one wait; the first to be called closes the other for a new one."""
    ends = [os.pipe2(os.O_NONBLOCK) for _ in range(2)]
    quiet = os.pipe2(os.O_NONBLOCK)
    told: list[str | bytes] = []

    def new() -> None:
        try:
            told.append(os.read(quiet[0], 1))
        except BlockingIOError:
            told.append("got an event of the old one")
        stop(loop)

    def speak() -> None:
        os.write(quiet[1], b"a")

    def first(mine: int, other: int) -> None:
        told.append("old")
        for fd in (mine, other):
            loop.unwatch(fd)
        os.dup2(quiet[0], other)  # as a new channel gets the lowest number that is free
        loop.watch(other, new)
        loop.call_after("later", 0.01, speak)

    for (mine, send), (other, _) in (ends, ends[::-1]):
        os.write(send, b"a")
        loop.watch(mine, lambda mine=mine, other=other: first(mine, other))  # type: ignore[misc]

    loop.run()

    assert told == ["old", b"a"]  # it gets its own events
    for fd in (*ends[0], *ends[1], *quiet):
        os.close(fd)


def test_what_is_watched_and_unwatched_at_once_is_forgotten(
    loop: Loop, pipe: tuple[int, int]
) -> None:
    receive, send = pipe
    os.write(send, b"a")
    loop.watch(receive, lambda: pytest.fail("it is not watched"))
    loop.unwatch(receive)
    loop.call_after("end", 0, lambda: stop(loop))

    loop.run()


def test_a_timer_that_is_due_can_be_run_from_something_long(turning: Loop, turns: Turns) -> None:
    called: list[str] = []
    turning.call_after("fed", 0.01, lambda: called.append("fed"))

    turning.run_if_due("fed")
    assert called == []
    turns.tick(0.02)
    turning.run_if_due("fed")
    turning.run_if_due("fed")
    turning.run_if_due("never there")

    assert called == ["fed"]


@pytest.fixture
def turning(turns: Turns, loop: Loop) -> Iterator[Loop]:
    """A loop for which no time passes but by its turns."""
    ticks = os.eventfd(1)
    loop.watch(ticks, turns.tick)
    yield loop
    loop.unwatch(ticks)
    os.close(ticks)


def test_timers_run_in_the_order_of_their_ends(turning: Loop) -> None:
    loop = turning
    called: list[str] = []
    loop.call_after("c", 0.03, lambda: called.append("c"))
    loop.call_after("end", 0.04, lambda: stop(loop))
    loop.call_after("a", 0, lambda: called.append("a"))
    loop.call_after("b", 0.01, lambda: called.append("b"))

    loop.run()

    assert called == ["a", "b", "c"]


def test_the_same_key_replaces_a_timer_and_cancel_forgets_it(loop: Loop) -> None:
    called: list[str] = []
    loop.call_after("a", 0, lambda: called.append("old"))
    loop.call_after("a", 0.01, lambda: called.append("new"))
    loop.call_after("b", 0, lambda: called.append("cancelled"))
    loop.cancel("b")
    loop.cancel("never there")
    loop.call_after("end", 0.02, lambda: stop(loop))

    loop.run()

    assert called == ["new"]


def test_extend_moves_a_timer_later_and_never_earlier(turning: Loop) -> None:
    loop = turning
    called: list[str] = []
    loop.call_after("moved", 0, lambda: called.append("moved"))
    loop.extend("moved", 0.02)
    loop.call_after("stays", 0.01, lambda: called.append("stays"))
    loop.extend("stays", 0)
    loop.extend("never there", 1)
    loop.call_after("end", 0.03, lambda: stop(loop))

    loop.run()

    assert called == ["stays", "moved"]


def test_a_timer_may_start_and_cancel_others(loop: Loop) -> None:
    called: list[str] = []

    def third() -> None:
        called.append("third")
        stop(loop)

    def first() -> None:
        called.append("first")
        loop.cancel("second")
        loop.call_after("third", 0, third)

    loop.call_after("first", 0, first)
    loop.call_after("second", 0, lambda: called.append("second"))

    loop.run()

    assert called == ["first", "third"]


def test_cancelled_timers_do_not_pile_up_below_one_that_lasts(loop: Loop) -> None:
    loop.call_after("a day", 86_400, lambda: None)

    for number in range(10_000):
        loop.call_after(number, 3600, lambda: None)
        loop.cancel(number)

    assert len(loop._by_time) < 200


def test_nothing_is_waited_for_once_all_timers_are_cancelled(
    loop: Loop, pipe: tuple[int, int]
) -> None:
    """A cancelled timer that stayed in the heap would wake an idle protector once more."""
    receive, _ = pipe
    loop.watch(receive, lambda: None)
    for number in range(3):
        loop.call_after(number, 60, lambda: None)
    loop.call_after("last", 0, lambda: loop.call_after("end", 0, lambda: stop(loop)))
    for number in range(3):
        loop.cancel(number)

    loop.run()

    assert loop._until_due() is None


def test_each_signal_calls_back_from_the_loop_in_order(loop: Loop) -> None:
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    called: list[int] = []
    free = [fd for fd in range(256) if not os.path.lexists(f"/proc/self/fd/{fd}")]

    def note(number: int) -> None:
        called.append(number)
        if len(called) == 3:
            stop(loop)

    loop.catch(numbers, note)
    try:
        # Twice the same: a second TERM means something that the first did not.
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        loop.run()
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        for fd in free:  # its pipe, which lives as long as the protector
            if os.path.lexists(f"/proc/self/fd/{fd}"):
                os.close(fd)

    assert called == [signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2]


class Asked:
    """An epoll that notes how long each wait may take."""

    def __init__(self, loop: Loop, turns: Turns | None = None) -> None:
        """turns: so that no time passes but by waits."""
        self._epoll = loop._epoll
        self._turns = turns
        self.waits: list[float | None] = []

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        self.waits.append(timeout)
        found = self._epoll.poll(timeout)
        if self._turns is not None and timeout:
            self._turns.tick(timeout)
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)


def test_what_has_come_by_a_deadline_is_heard_before_it_is_judged(pipe: tuple[int, int]) -> None:
    """As by one that has stood still, or goes on with deadlines that passed before it began."""
    receive, send = pipe
    loop = Loop()
    seen: list[str] = []

    def heard() -> None:
        os.read(receive, 1)
        seen.append("heard")
        loop.cancel("deadline")
        loop.call_after("end", 0.0, lambda: stop(loop))

    loop.watch(receive, heard)
    loop.call_after("deadline", -1.0, lambda: seen.append("too late"))
    os.write(send, b"x")
    loop.run()
    loop.close()

    assert seen == ["heard"]


def test_what_is_watched_while_the_clock_stands_still_is_called_back_for(
    pipe: tuple[int, int], turns: Turns
) -> None:
    """As with a clock that goes in steps: then it is due when it is made."""
    receive, send = pipe
    loop = Loop()
    count, seen = 0, list[bytes]()

    def heard() -> None:
        seen.append(os.read(receive, 1))
        stop(loop)

    def turn() -> None:
        nonlocal count
        count += 1
        if count == 1:
            loop.call_after("due", 0.0, lambda: None)
        elif count == 2:
            loop.watch(receive, heard)
        elif count == 10:
            stop(loop)

    ready = os.eventfd(1)
    loop.watch(ready, turn)
    os.write(send, b"x")
    loop.run()
    loop.close()
    os.close(ready)

    assert seen == [b"x"]


def test_what_is_expected_soon_is_asked_for_without_sleeping(pipe: tuple[int, int]) -> None:
    receive, send = pipe
    loop = Loop(soon_s=1000.0)
    asked = loop._epoll = Asked(loop)  # type: ignore[assignment]
    loop.watch(receive, lambda: stop(loop))
    loop.soon = True
    os.write(send, b"a")

    loop.run()

    assert asked.waits == [0]
    assert not loop.soon
    loop.close()


def test_without_processor_time_to_spare_it_sleeps_and_asks_again_later(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, send = pipe
    asked: list[bool] = []
    now_ns = 0
    monkeypatch.setattr("socketprotector.system.loop.time.monotonic_ns", lambda: now_ns)

    def spare() -> bool:
        asked.append(len(asked) > 0)
        return asked[-1]

    loop = Loop(soon_s=1000.0, spare=spare)
    watched = loop._epoll = Asked(loop)  # type: ignore[assignment]

    def come() -> None:
        nonlocal now_ns
        os.read(receive, 1)
        loop.soon = True
        if len(watched.waits) == 3:
            stop(loop)
            return
        if len(watched.waits) == 2:
            now_ns = 3_600_000_000_000
        os.write(send, b"a")

    loop.watch(receive, come)
    loop.soon = True
    os.write(send, b"a")
    loop.run()

    assert watched.waits == [None, None, 0]  # asleep, asleep, awake
    assert asked == [False, True]  # not each time
    loop.close()


def test_what_does_not_come_soon_is_slept_for(pipe: tuple[int, int], turns: Turns) -> None:
    receive, send = pipe
    loop = Loop(soon_s=0.0002)
    asked = loop._epoll = Asked(loop, turns)  # type: ignore[assignment]
    loop.watch(receive, lambda: stop(loop))

    def write() -> None:
        os.write(send, b"a")

    loop.call_after("later", 0.001, write)
    loop.soon = True

    loop.run()

    assert asked.waits[-1] is None  # nothing but the descriptor is left to wait for
    assert any(wait for wait in asked.waits[:-1])  # it slept until the timer
    loop.close()


def test_a_timer_that_is_due_is_not_awaited_by_asking(pipe: tuple[int, int]) -> None:
    loop = Loop(soon_s=1000.0)
    loop.call_after("end", 0.001, lambda: stop(loop))
    loop.soon = True

    loop.run()  # else it would take a thousand seconds

    loop.close()


@pytest.mark.parametrize("seconds", [30 * 86_400.0, 999_999_999.0, math.inf])
def test_a_timer_may_be_further_off_than_the_kernel_can_wait(
    loop: Loop, pipe: tuple[int, int], seconds: float
) -> None:
    """epoll_wait(2) takes 24.8 days at most."""
    receive, send = pipe
    os.write(send, b"a")
    loop.watch(receive, lambda: stop(loop), READ)
    loop.call_after("late", seconds, lambda: pytest.fail("it was not due"))

    loop.run()


def test_a_wait_that_ends_before_its_timer_is_due_goes_on(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "LONGEST_WAIT_S", 0.001)
    due = time.monotonic() + 0.02
    loop.call_after("end", 0.02, lambda: stop(loop))

    loop.run()

    assert time.monotonic() >= due
