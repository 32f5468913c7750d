"""Connections over 127.0.0.1: both ends are ours, or the user of the other end is known."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from socketprotector.system import loopback, sock_diag
from tests import needs
from tests.running import DEADLINE_S, eventually
from tests.scenarios.tools import NOBODY

CONNECTS = "import socket, sys; one = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"


def test_a_pair_is_one_connection_whose_port_is_closed() -> None:
    client, server = loopback.pair()
    assert server is not None
    with client, server:
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        assert server.getsockname() == client.getpeername()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(client.getpeername(), DEADLINE_S)


@pytest.mark.parametrize(("strangers", "is_made"), [(3, True), (80, False)])
def test_a_stranger_that_connects_first_is_closed(
    monkeypatch: pytest.MonkeyPatch, strangers: int, is_made: bool
) -> None:
    listen, others = loopback.listen, list[socket.socket]()

    def crowded() -> socket.socket:
        listening = listen()
        at = listening.getsockname()
        others.extend(socket.create_connection(at, DEADLINE_S) for _ in range(strangers))
        return listening

    monkeypatch.setattr(loopback, "listen", crowded)
    with ExitStack() as stack:
        client, server = loopback.pair()
        stack.enter_context(client)
        assert (server is not None) == is_made
        if server is not None:
            stack.enter_context(server)
            assert server.getpeername() == client.getsockname()
        for each in others:
            stack.enter_context(each)
            try:
                assert each.recv(1) == b""
            except ConnectionResetError:
                assert not is_made, "it waited when the port was closed"


def accepted_from(listening: socket.socket) -> socket.socket:
    listening.settimeout(DEADLINE_S)
    return listening.accept()[0]


def test_the_user_of_a_connection_is_known_until_it_is_closed() -> None:
    with loopback.listen() as listening:
        client = socket.create_connection(listening.getsockname())
        with accepted_from(listening) as server:
            with client:
                assert sock_diag.peer_user(server) == os.geteuid()
                client.shutdown(socket.SHUT_WR)
                assert sock_diag.peer_user(server) == os.geteuid()
            assert sock_diag.peer_user(server) is None, "of a closed end the kernel says user 0"


def test_a_listener_at_the_place_of_a_closed_end_is_no_peer() -> None:
    with loopback.listen() as listening:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.bind(("127.0.0.1", 0))
        name = client.getsockname()
        client.connect(listening.getsockname())
        with accepted_from(listening) as server:
            client.close()  # by a reset, so that the port is free
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(name)
                other.listen()
                with pytest.raises(OSError, match="not connected"):
                    server.getpeername()
                with pytest.raises(OSError, match="not connected"):
                    sock_diag.peer_user(server)


@needs.ANOTHER_USER
@pytest.mark.parametrize("leaves", [False, True])
def test_another_user_is_seen(leaves: bool) -> None:
    code = CONNECTS + ("one.send(b'x')" if leaves else "sys.stdin.read()")
    with loopback.listen() as listening:
        words = [sys.executable, "-S", "-c", code, str(listening.getsockname()[1])]
        with (
            subprocess.Popen(words, stdin=subprocess.PIPE, user=NOBODY, cwd="/") as process,
            accepted_from(listening) as server,
        ):
            if leaves:
                process.communicate(timeout=DEADLINE_S)
                eventually(lambda: sock_diag.peer_user(server) is None, "its end is closed")
            else:
                assert sock_diag.peer_user(server) == NOBODY
