"""A wait for the queue that the kernel refuses (epoll_ctl: ENOMEM, ENOSPC) is tried again."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from socketprotector_client import wait_set
from socketprotector_client.errors import Drained
from socketprotector_client.intake import Intake
from socketprotector_client.wait_set import WaitSet

from .sharing import connect, in_child, taken


class Scarce:
    """An epoll to which the queue cannot be added, so many times."""

    def __init__(self, waits: WaitSet, times: int, refused: int = select.EPOLLEXCLUSIVE) -> None:
        """Stand in for the epoll of a set.

        refused: a flag of the additions that fail.
        """
        self._refused = refused
        self._epoll = waits._epoll
        self.times = times
        waits._epoll = self  # type: ignore[assignment]

    def register(self, fd: int, events: int) -> None:
        if events & self._refused and self.times:
            self.times -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._epoll.register(fd, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def when_asked(intake: Intake) -> Scarce:
    taken(intake).close()
    return Scarce(intake.waits, 3)


def by_a_loop_that_sleeps(intake: Intake) -> Scarce:
    taken(intake).close()
    scarce = Scarce(intake.waits, 3)
    assert intake.sleep(0) == (False, False)
    assert scarce.times < 3
    return scarce


def after_the_limit(intake: Intake) -> Scarce:
    with taken(intake), taken(intake):
        scarce = Scarce(intake.waits, 3)
    assert scarce.times < 3
    return scarce


def by_a_pool(intake: Intake) -> Scarce:
    intake.share()
    scarce = Scarce(intake.waits, 3)
    with taken(intake):
        assert scarce.times < 3
    return scarce


def by_a_pool_that_begins(intake: Intake) -> Scarce:
    scarce = Scarce(intake.waits, 3)
    intake.share()
    return scarce


def without_a_thread(intake: Intake) -> Scarce:
    """The timer that tries again cannot be started at first."""
    taken(intake).close()
    scarce, start, refusals = Scarce(intake.waits, 3), threading.Thread.start, iter([True])

    def started(self: threading.Thread) -> None:
        if next(refusals, False):
            raise RuntimeError("can't start new thread")
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", started)
        assert intake.sleep(0) == (False, False)
    assert scarce.times == 0
    return scarce


def outside_a_loop(intake: Intake) -> Scarce:
    intake.queue.join(WaitSet())
    return Scarce(intake.waits, 3)


@pytest.mark.parametrize(
    "refused",
    [
        when_asked,
        by_a_loop_that_sleeps,
        after_the_limit,
        by_a_pool,
        by_a_pool_that_begins,
        without_a_thread,
        outside_a_loop,
    ],
)
def test_a_refused_wait_loses_no_connection_and_is_tried_again(
    intake: Intake, refused: Callable[[Intake], Scarce], caplog: pytest.LogCaptureFixture
) -> None:
    scarce = refused(intake)

    taken(intake).close()

    assert scarce.times == 0
    assert caplog.messages == ["cannot wait for connections: No space left on device; trying again"]


def test_a_wait_is_tried_again_though_a_thread_was_refused_earlier(intake: Intake) -> None:
    intake.waits._epoll = without_a_thread(intake)._epoll
    scarce = when_asked(intake)

    taken(intake).close()

    assert scarce.times == 0


def test_waits_that_are_refused_again_later_are_logged_again(
    intake: Intake, timers: list[Callable[[], None]], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        taken(intake).close()
        scarce = Scarce(intake.waits, 2)
        assert intake.sleep(0) == (False, False)
        for _ in range(2):
            timers.pop()()
        assert scarce.times == 0
        intake.waits._epoll = scarce._epoll

    assert len(caplog.messages) == 2


def test_a_wait_that_a_loop_is_refused_is_tried_again_there(
    intake: Intake, caplog: pytest.LogCaptureFixture
) -> None:
    joined = WaitSet()
    intake.queue.join(joined)
    scarce = Scarce(joined, 3)
    with socket.create_connection(intake.source.sockname):
        assert joined.wait(10)
        connection = intake.get_now()
        assert connection is not None
        intake.queue.move_back_in_loop()
        assert scarce.times < 3
        connection.close()

    with socket.create_connection(intake.source.sockname):
        assert joined.wait(10)
    assert scarce.times == 0
    assert caplog.messages == ["cannot wait for connections: No space left on device; trying again"]


def test_a_worker_that_sleeps_outside_the_loop_that_it_joined_still_waits(intake: Intake) -> None:
    intake.queue.join(WaitSet())

    with connect(intake):
        assert intake.sleep(10) == (True, False)


def test_a_worker_in_a_loop_has_more_to_take_unless_it_pauses(intake: Intake) -> None:
    intake.queue.join(WaitSet())
    assert not intake.has_more()
    with connect(intake):
        assert intake.has_more()

        intake.queue.pause()
        assert not intake.has_more()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_thread_that_ends_wakes_the_others_as_soon_as_the_kernel_has_room(
    intake: Intake, interrupted: bool
) -> None:
    intake.share()
    scarce = Scarce(intake.waits, 3, select.EPOLLIN)
    intake.end()

    if interrupted:
        intake.interrupt()
    with pytest.raises(Drained):
        intake.get()

    assert scarce.times == 0
    assert intake.waits.wait(0)


# -- a forked child -----------------------------------------------------------------------------


def test_a_child_that_is_refused_the_wait_tries_again(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, refusals = WaitSet.add, iter([True, True])

    def refused(self: WaitSet, fds: Iterable[int], events: int = select.EPOLLIN) -> None:
        if events & select.EPOLLEXCLUSIVE and next(refusals, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, fds, events)

    monkeypatch.setattr(WaitSet, "add", refused)
    with socket.create_connection(intake.source.sockname):
        in_child(lambda: intake.get(10) is not None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_child_without_an_epoll_of_its_own_fails_and_leaves_its_parents_alone(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def fails() -> bool:
        with pytest.raises(ValueError, match="closed"):
            intake.get(10)
        intake.close()
        return True

    monkeypatch.setattr(wait_set, "epoll", refused)
    in_child(fails)

    taken(intake).close()
