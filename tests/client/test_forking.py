"""A forked child may use what it inherits, or leave it: neither harms its parent."""

from __future__ import annotations

import os
import signal

import pytest
from socketprotector_client.watchdog import Watchdog

from tests.channel import Channel, Worker
from tests.client.sharing import HOME, Sharing
from tests.procfs import descriptors, sleeps_in, threads_of, watched_by
from tests.running import eventually

#: So often that it is soon, and so seldom that it never comes within a test.
SOON = {"WATCHDOG_USEC": "20000"}
#: The same for children, which are killed when they have not run for that long.
SELDOM = {"WATCHDOG_USEC": "4000000"}
LATE = {"WATCHDOG_USEC": "7200000000"}
EPOLLIN, EPOLLRDHUP = 0x1, 0x2000


def watched(pid: int) -> dict[int, int]:
    """What the epolls of a process watch, and those that it has a copy of: events by descriptor."""
    return {fd: events & (EPOLLIN | EPOLLRDHUP) for fd, events in watched_by(pid).items()}


def files(pid: int) -> list[str]:
    """What the descriptors of a process are, above those of a program that has just begun."""
    return [target for fd, target in descriptors(pid).items() if fd > 2]


def prefork(channel: Channel, env: dict[str, str]) -> tuple[Worker, int]:
    """A worker that accepts like its child; both wait."""
    worker = channel.start("forks.py", "prefork", env=env)
    child = int(worker.read_line().split()[1])
    for pid in (worker.pid, child):
        eventually(lambda pid=pid: "poll" in sleeps_in(pid)[0], "it waits")  # type: ignore[misc]
    return worker, child


def test_sigterm_to_a_child_does_not_make_its_parent_drain(channel: Channel) -> None:
    worker = channel.start("forks.py", "child waits")
    client = channel.connect()
    child = int(worker.read_line().split()[1])

    os.kill(child, signal.SIGTERM)

    assert client.ask("draining") == "False"
    client.close()
    assert "Exception" not in channel.log.read_text()
    second = channel.connect()
    os.kill(int(worker.read_line().split()[1]), signal.SIGTERM)
    assert second.ask("hello") == "echo hello"
    second.close()
    channel.end_channel()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


def test_a_child_serves_while_its_parent_takes_the_next(channel: Channel) -> None:
    worker = channel.start("forks.py", "child serves")

    clients = [channel.connect() for _ in range(3)]
    pids = {client.ask("pid") for client in clients}

    assert len(pids) == 3
    assert str(worker.pid) not in pids
    for client in clients:
        client.close()
    channel.end_channel()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


def test_processes_that_share_a_listener_take_turns_and_all_end(channel: Channel) -> None:
    worker = channel.start("forks.py", "prefork")
    child = worker.read_line().split()[1]

    clients = [channel.connect() for _ in range(2)]
    pids = {client.ask("pid") for client in clients}
    assert pids == {str(worker.pid), child}

    waiting = channel.connect()
    clients[0].close()
    assert waiting.ask("pid") in pids
    channel.end_channel()
    clients[1].close()
    waiting.close()

    assert worker.read_rest() == ["child ended 0"]
    assert worker.wait() == 0


def test_a_child_watches_and_keeps_nothing_that_is_its_parents(channel: Channel) -> None:
    worker, child = prefork(channel, LATE)
    (line,) = [fd for fd, events in watched(worker.pid).items() if events == EPOLLRDHUP]

    assert len(watched(worker.pid)) == 3  # and its watchdog
    assert watched(child) == {channel.reader.fileno(): EPOLLIN, line: EPOLLRDHUP}
    kinds = [file.partition(":")[0] for file in files(child)]
    assert kinds.count("pipe") == 0
    assert kinds.count("socket") == 2  # the channel and the RETURN line


@pytest.mark.parametrize("end", ["channel", "line"])
def test_what_is_said_on_the_return_line_is_left_to_the_parent(channel: Channel, end: str) -> None:
    worker, child = prefork(channel, {})
    worker.return_line.send(b"news of a later protector")
    with_parent, with_child = channel.connect(), channel.connect()
    assert {with_parent.ask("pid"), with_child.ask("pid")} == {str(worker.pid), str(child)}
    with_parent.close()
    with_child.close()

    channel.end_channel() if end == "channel" else worker.retire()

    assert worker.read_rest() == ["child ended 0"]
    assert worker.wait() == 0
    with pytest.raises(ConnectionResetError):  # what it says to us is still to come, and unread
        worker.return_line.recv(1)


def test_no_thread_is_begun_before_the_program_serves(channel: Channel) -> None:
    worker = channel.start("forks.py", "prepares", env=SOON)

    assert [worker.read_line() for _ in range(2)] == ["threads 1", "threads 2"]


def test_the_parent_answers_for_the_children_of_a_socket_server(channel: Channel) -> None:
    server = Sharing(channel, "run", "2", "16", HOME, alone=False, env=SELDOM)
    clients = [channel.connect() for _ in range(2)]
    pids = {int(client.ask("pid")) for client in clients}

    assert pids == set(server.children())
    assert len(threads_of(server.program.pid)) == 1
    saying: list[int] = []
    while len(saying) < 2:
        pid, text = channel.hear()
        saying += [pid] if "WATCHDOG" in text else []
    assert set(saying) == {server.program.pid}


def test_the_child_of_a_child_closes_no_descriptor_that_is_not_the_watchdogs() -> None:
    dog = Watchdog(3600.0, lambda: True)
    first = dog.fileno()
    dog.after_fork_in_child()
    pairs = [os.pipe() for _ in range(2)]  # which take the numbers
    opened = [fd for pair in pairs for fd in pair]
    try:
        assert first in opened

        dog.after_fork_in_child()

        assert [os.fstat(fd).st_nlink for fd in opened] == [1] * 4
    finally:
        for fd in opened:
            os.close(fd)
