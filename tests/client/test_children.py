"""Forked children: what their parent refuses, and how they know it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from socketprotector_client import children, wire
from socketprotector_client.children import Children
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.seat import MOST, Seats
from socketprotector_client.worker import current

from .sharing import in_child


@pytest.mark.parametrize("count", [-1, 0, MOST + 1])
def test_no_child_or_more_than_there_are_seats_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot fork {count} processes: 1 to 1024"):
        Children().run(lambda: None, count, lambda: None, lambda: True, lambda: False)


def test_of_blocked_signals_only_usr1_is_taken_and_only_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that blocks another one may wait for it in a thread of its own."""
    monkeypatch.setattr("gc.freeze", lambda: None)
    meanwhile: set[int] = set()

    def is_over() -> bool:
        meanwhile.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return True

    blocked = {signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        Children().run(lambda: None, 1, lambda: None, is_over, lambda: False, allow_threads=True)
    finally:
        after = signal.pthread_sigmask(signal.SIG_SETMASK, before)

    assert (meanwhile & blocked, after & blocked) == ({signal.SIGTERM}, blocked)


def test_forks_that_fail_wait_ever_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    failing = Children()
    waits = []
    for _ in range(12):
        failing._failed()
        waits.append(failing._fork_at)
    assert waits == [0, 0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5]


def test_a_child_counts_while_the_one_that_it_replaces_still_finishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fd = os.memfd_create("board")
    os.ftruncate(fd, wire.BOARD_BYTES * (wire.BOARD_WORKER_SLOTS + 2))
    board = Scoreboard(fd, 0)
    monkeypatch.setattr(current(), "board", board)
    monkeypatch.setattr(children, "_exit", os._exit)
    monkeypatch.setattr("gc.freeze", lambda: None)
    run = Children().run
    with pytest.raises(ChildProcessError, match="before all children were ready"):
        run(lambda: None, 1, lambda: None, lambda: False, lambda: False, allow_threads=True)

    def counts() -> bool:
        board.begin_child(1)  # child 0 still finishes
        board.count_taken(5, 1)
        return True

    in_child(counts)
    assert board.end_child(1) is not None


def test_threads_that_python_does_not_know_are_logged_at_the_fork(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("os.listdir", lambda path: ["1", "2", "3", "4", "5"])
    monkeypatch.setattr(threading, "active_count", lambda: 3)

    children._prepare(allow_threads=True)

    assert caplog.messages[0].startswith("2 native threads run at the fork")


def test_a_child_whose_parent_died_at_the_fork_knows_that_it_is_an_orphan() -> None:
    """This process stands for the child: its parent has not made the seats."""
    seats, orphaned = Seats(), []
    seat = seats.take(0, lambda: orphaned.append(True))
    seat.leave()
    os.close(seat.parents_end)
    assert orphaned
