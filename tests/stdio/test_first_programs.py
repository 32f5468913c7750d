"""A release whose first programs fail early is seen; one client's failure is no such thing."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from socketprotector.programs.stdio import first_programs
from socketprotector.programs.stdio.first_programs import FirstPrograms
from tests.running import DEADLINE_S, eventually

Pair = tuple[socket.socket, socket.socket]
FAILED = 1 << 8  # as wait(2) gives it
PID = 1 << 23  # of no process


# -- what a pool makes of the end of a program ---------------------------------------------


def connected(family: int) -> Pair:
    """A program's end of a connection, and its client's."""
    if family == socket.AF_UNIX:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), DEADLINE_S)
        return server.accept()[0], client


@pytest.fixture(params=[socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    both = connected(request.param)
    yield both
    for each in both:
        each.close()


@pytest.fixture
def tcp() -> Iterator[Pair]:
    both = connected(socket.AF_INET)
    yield both
    for each in both:
        each.close()


def started(end: socket.socket, pid: int = PID) -> FirstPrograms:
    first = FirstPrograms()
    assert first.watches
    first.started(pid, os.dup(end.fileno()))
    return first


def holds_after_look(first: FirstPrograms) -> bool:
    first.look()
    return first.holds


def test_a_program_that_ends_badly_and_has_sent_nothing_has_failed_at_once(pair: Pair) -> None:
    end, client = pair
    first = started(end)
    client.sendall(b"hello\n")
    first.look()
    first.ended(PID, FAILED)
    assert (first.unsent, first.work, first.holds) == (
        [f"X_SOCKETPROTECTOR_PROGRAM=failed {PID} {FAILED}"],
        False,
        False,
    )


@pytest.mark.parametrize("status", [FAILED, 9])
def test_one_that_has_sent_something_works_however_it_ends(pair: Pair, status: int) -> None:
    end, client = pair
    first = started(end)
    client.sendall(b"hello\n")
    end.sendall(b"no\n")
    first.ended(PID, status)
    assert (first.unsent, first.work) == (["X_SOCKETPROTECTOR_PROGRAM=works"], True)
    assert not first.watches


def test_one_that_sends_is_let_go_while_it_runs(pair: Pair) -> None:
    end, client = pair
    first = started(end)
    client.sendall(b"hello\n")
    first.look()
    assert first.holds
    end.sendall(b"hi\n")
    first.look()
    assert (first.work, first.holds) == (True, False)


def test_status_0_works_whatever_was_sent(pair: Pair) -> None:
    first = started(pair[0])
    first.ended(PID, 0)
    assert first.work


def test_a_program_that_was_not_watched_works_by_its_status_alone() -> None:
    first = FirstPrograms()
    first.ended(PID, FAILED)
    assert (first.work, first.unsent) == (False, [])
    first.ended(PID + 1, 0)
    assert first.work


def test_a_client_that_leaves_without_a_word_proves_nothing(tcp: Pair) -> None:
    end, client = tcp
    first = started(end)
    client.close()
    end.recv(1)  # its end has come
    first.ended(PID, FAILED)
    assert (first.unsent, first.work, first.holds) == ([], False, False)


def test_a_client_that_has_sent_all_of_it_is_still_there(tcp: Pair) -> None:
    end, client = tcp
    first = started(end)
    client.sendall(b"all of it")
    client.shutdown(socket.SHUT_WR)
    while end.recv(100):
        pass
    first.ended(PID, FAILED)
    assert first.unsent == [f"X_SOCKETPROTECTOR_PROGRAM=failed {PID} {FAILED}"]


def test_a_unix_client_whose_words_were_read_proves_nothing() -> None:
    end, client = connected(socket.AF_UNIX)
    with end, client:
        first = started(end)
        client.sendall(b"hello")
        end.recv(100)
        first.ended(PID, FAILED)
    assert (first.unsent, first.work) == ([], False)


def test_one_that_lives_on_has_not_failed(tcp: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first = started(tcp[0])
    first.look()
    assert not first.work
    monkeypatch.setattr(first_programs, "LIVED_S", 0.0)
    first.look()
    assert (first.work, first.holds) == (True, False)


def test_one_that_closes_its_connection_keeps_no_client_waiting(tcp: Pair) -> None:
    end, client = tcp
    words = ["sh", "-c", "read line; exec sleep 600 <&- >&-"]
    with subprocess.Popen(words, stdin=end.fileno(), stdout=end.fileno()) as program:
        try:
            first = started(end, program.pid)
            end.close()
            first.look()
            assert first.holds
            client.sendall(b"hello\n")

            eventually(lambda: not holds_after_look(first), "its connection is let go")

            assert client.recv(1) == b""
            assert (first.unsent, first.work) == ([], False)
        finally:
            program.kill()


def test_only_so_many_connections_are_kept(tcp: Pair) -> None:
    first = FirstPrograms()
    for pid in range(first_programs.WATCHED):
        assert first.watches
        first.started(pid, os.dup(tcp[0].fileno()))
    assert not first.watches
    first.ended(0, FAILED)
    assert first.watches
    first.ended(1, 0)
    assert not first.holds
