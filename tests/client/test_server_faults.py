"""A SocketServer when something breaks: no more is lost than the break itself takes."""

from __future__ import annotations

import os
import signal
import socket

import pytest
from socketprotector_client import SocketServer
from socketprotector_client.address import sockname_of

from tests.channel import PROGRAMS, PYTHON, Channel
from tests.client.sharing import HOME, Sharing, let_open, lowest_free, refuses, until_stopped
from tests.running import eventually


def test_a_killed_child_loses_only_the_connection_it_had(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "2", "64", HOME)
    victim, other = sharing.connect(), sharing.connect()
    pids = victim.ask("pid"), other.ask("pid")
    waiting = [sharing.connect() for _ in range(3)]
    for client in waiting:
        client.say("pid")

    os.kill(int(pids[0]), signal.SIGKILL)

    assert victim.hear() == ""
    assert other.ask("hello") == "echo hello"
    other.close()
    for client in waiting:
        assert client.hear() != pids[0]
        client.close()
    eventually(lambda: "ended with -9; 1 left" in channel.log.read_text(), "a line about it")


def test_connections_wait_for_the_child_that_replaces_the_only_one(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    victim, waiting = sharing.connect(), sharing.connect()
    waiting.say("hello")
    os.kill(int(victim.ask("pid")), signal.SIGKILL)
    assert victim.hear() == ""

    assert waiting.hear() == "echo hello"


@pytest.mark.parametrize("way", ["run", "by hand"])
def test_a_killed_parent_ends_all_once_connected_clients_are_served(
    channel: Channel, way: str
) -> None:
    sharing = Sharing(channel, *(["run", "1", "64"] if way == "run" else [way]), HOME)
    serving, waiting = sharing.connect(), sharing.connect()
    assert serving.ask("hello") == "echo hello"
    sharing.watch()

    sharing.signal(signal.SIGKILL)

    serving.close()
    assert waiting.ask("hello") == "echo hello"
    waiting.close()
    sharing.wait_for_all()
    assert refuses(sharing.listeners[0])


@pytest.mark.parametrize("closed", ["<&-", "<&- 2>&-"])
def test_a_program_whose_standard_streams_are_closed_serves(channel: Channel, closed: str) -> None:
    shell = ("sh", "-c", f'exec "$@" {closed}', "sh")
    program = channel.spawn(
        *shell, PYTHON, PROGRAMS / "shares.py", "run", "1", "64", HOME, alone=True
    )
    client = channel.client(sockname_of(program.read_line()))

    assert client.ask("hello") == "echo hello"

    client.close()
    os.kill(program.pid, signal.SIGTERM)
    assert (program.read_last(), program.wait()) == ("ended", 0)


def test_a_killed_accepting_process_is_an_error_of_the_program(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    client = sharing.connect()
    assert client.ask("hello") == "echo hello"

    os.kill(sharing.accepting(), signal.SIGKILL)

    eventually(lambda: client.ask("draining") == "True", "the drain")
    client.close()
    assert sharing.program.wait() == 1
    assert "accepting process ended with -9" in channel.log.read_text()


def test_signals_to_the_whole_service_do_not_end_the_accepting_process(
    channel: Channel,
) -> None:
    sharing = Sharing(channel, "run", "0", "64", HOME)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(sharing.accepting(), number)

    client = sharing.connect()
    client.say("hello")
    sharing.signal(signal.SIGUSR1)
    assert client.hear() == "echo hello"


def test_a_child_that_inherits_a_handler_which_closes_only_ends_itself(
    channel: Channel,
) -> None:
    sharing = Sharing(channel, "by hand", HOME)
    client = sharing.connect()
    child = int(client.ask("pid"))

    os.kill(child, signal.SIGTERM)

    eventually(lambda: client.ask("draining") == "True", "the drain")
    client.close()
    assert sharing.program.read_line() == "child ended"
    assert not refuses(sharing.listeners[0])
    sharing.signal(signal.SIGTERM)
    assert (sharing.program.read_last(), sharing.program.wait()) == ("ended", 0)


def test_an_idle_child_ends_at_once_by_such_a_handler(channel: Channel) -> None:
    sharing = Sharing(channel, "by hand", HOME)
    client = sharing.connect()
    child = int(client.ask("pid"))
    client.reset()
    eventually(lambda: "handler failed" in channel.log.read_text(), "an idle child")

    os.kill(child, signal.SIGTERM)

    assert sharing.program.read_line() == "child ended"


def test_without_a_descriptor_clients_wait_in_the_backlog(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    accepting = sharing.accepting()
    before = let_open(accepting, lowest_free(accepting))
    client = sharing.connect()
    client.say("hello")
    eventually(lambda: "cannot accept: Too many open files" in channel.log.read_text(), "a line")

    let_open(accepting, before)

    assert client.hear() == "echo hello"
    assert channel.log.read_text().count("Too many") == 1


def test_a_stop_waits_for_connected_clients_while_there_is_no_descriptor(
    channel: Channel,
) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    accepting = sharing.accepting()
    before = let_open(accepting, lowest_free(accepting))
    client = sharing.connect()
    client.say("hello")
    eventually(lambda: "cannot accept: Too many open files" in channel.log.read_text(), "a line")
    sharing.signal(signal.SIGTERM)

    let_open(accepting, before)

    assert client.hear() == "echo hello"
    client.close()
    assert sharing.program.wait() == 0


def test_a_handler_that_raises_is_logged_and_its_child_goes_on(channel: Channel) -> None:
    sharing = Sharing(channel, "run", "1", "64", HOME)
    unlucky = sharing.connect()
    pid = unlucky.ask("pid")

    assert unlucky.ask("fail") == ""

    assert sharing.connect().ask("pid") == pid
    assert "RuntimeError: asked to fail" in channel.log.read_text()


def test_clients_that_reset_before_and_after_accept_cost_the_others_nothing(
    channel: Channel,
) -> None:
    sharing = Sharing(channel, "run", "0", "64", HOME)
    after = sharing.connect()
    after.reset()
    os.kill(sharing.accepting(), signal.SIGSTOP)
    until_stopped(sharing.accepting())
    before = sharing.connect()
    before.reset()
    os.kill(sharing.accepting(), signal.SIGCONT)
    client = sharing.connect()
    client.say("hello")

    sharing.signal(signal.SIGUSR1)

    assert client.hear() == "echo hello"
    gone = sharing.connect()
    client.close()
    assert gone.ask("hello") == "echo hello"
    gone.reset()
    assert sharing.connect().ask("hello") == "echo hello"


def test_a_close_that_no_client_reads_does_not_wait() -> None:
    server = SocketServer(HOME, queue=6)
    clients = [socket.create_connection(sockname_of(server.listeners[0])) for _ in range(30)]

    server.close()

    assert [client.recv(1) for client in clients[:1]] == [b""]
    assert refuses(server.listeners[0])
    for client in clients:
        client.close()


def test_a_close_has_a_deadline_if_one_is_given() -> None:
    server = SocketServer(HOME, queue=6)
    assert server._channel is not None
    reader_that_never_reads = os.dup(server._channel.fileno())
    clients = [socket.create_connection(sockname_of(server.listeners[0])) for _ in range(30)]

    server.close(0.01)

    assert refuses(server.listeners[0])
    os.close(reader_that_never_reads)
    for client in clients:
        client.close()
