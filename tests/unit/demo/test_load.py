"""The demo's clients, against a server that a test plays."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from socketprotector.demo.load import Load
from tests.running import DEADLINE_S

#: Longer than any test.
PAUSE_S = 100 * DEADLINE_S


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(DEADLINE_S)
        yield made


def load(server: socket.socket, concurrency: int = 1) -> Load:
    """Clients that each send two lines, with a long pause in between."""
    address = f"127.0.0.1:{server.getsockname()[1]}"
    return Load(
        address, concurrency=concurrency, count=concurrency, lines=2, pause_s=PAUSE_S
    ).start()


def answer(client: socket.socket) -> None:
    client.sendall(b"[1] " + client.recv(100))


def test_a_client_sends_nothing_during_its_pause(server: socket.socket) -> None:
    clients = load(server, 2)
    with server.accept()[0] as first, server.accept()[0] as second:
        answer(first)
        clients.wait_for(lambda seen: seen.pids == {1: 1}, DEADLINE_S)
        answer(second)
        clients.wait_for(lambda seen: seen.pids == {1: 2}, DEADLINE_S)
        # The load has looked at its pauses since the first answer.
        first.setblocking(False)
        with pytest.raises(BlockingIOError):
            first.recv(100)

        clients.hurry()
        for each in (first, second):
            each.settimeout(DEADLINE_S)
            answer(each)
        seen = clients.join()

    assert (seen.connections, seen.failures) == (2, ())


def test_a_server_that_ends_a_connection_between_two_lines_sent_no_wrong_answer(
    server: socket.socket,
) -> None:
    """A kill of the worker explains such an end, but no wrong answer."""
    clients = load(server)
    with server.accept()[0] as client:
        answer(client)
        clients.wait_for(lambda seen: seen.pids == {1: 1}, DEADLINE_S)

    [failure] = clients.join().failures

    assert failure.kind == "empty"


def test_an_answer_to_no_line_is_wrong(server: socket.socket) -> None:
    clients = load(server)
    with server.accept()[0] as client:
        line = client.recv(100)
        client.sendall(b"[1] " + line)
        clients.wait_for(lambda seen: seen.pids == {1: 1}, DEADLINE_S)
        client.sendall(b"[1] " + line)

        [failure] = clients.wait_for(lambda seen: bool(seen.failures), DEADLINE_S).failures

    clients.join()
    assert failure.kind == "wrong"
    assert failure.detail.startswith("not asked for: ")


def test_a_client_may_have_the_number_of_a_closed_stdin(server: socket.socket) -> None:
    clients = Load(f"127.0.0.1:{server.getsockname()[1]}", concurrency=1, count=1)
    stdin = os.dup(0)
    os.close(0)
    try:
        clients.start()
        with server.accept()[0] as client:
            line = client.recv(100)
            assert 0 in clients._open
            client.sendall(b"[1] " + line)
            seen = clients.join()
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)

    assert (seen.connections, seen.failures) == (1, ())
