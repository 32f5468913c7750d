"""Accept probes at a real server, with a loop whose timers the test runs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, cast

import pytest

from socketprotector.daemon import verdicts
from socketprotector.daemon.probe import Probe
from socketprotector.daemon.verdicts import Verdict
from socketprotector.model.probe_spec import ProbeSpec
from tests.running import eventually

RESET_AT_CLOSE = b"\1\0\0\0\0\0\0\0"


class Loop:
    """Keeps the next call, until the test runs it."""

    def __init__(self) -> None:
        self.next: Callable[[], None] | None = None

    def call_after(self, key: object, delay_s: float, call: Callable[[], None]) -> None:
        self.next = call

    def cancel(self, key: object) -> None:
        self.next = None

    def run_next(self) -> None:
        assert self.next is not None
        call, self.next = self.next, None
        call()


class Server:
    """The server, and what a probe asks of its target."""

    is_unix = False
    in_words = "the server"

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self.is_waiting = True

    def connect(self) -> tuple[socket.socket, int]:
        self.is_waiting = True
        client = socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        return client, client.connect_ex(self._listening.getsockname())

    def waits(self, connection: socket.socket) -> bool:
        return self.is_waiting

    def is_unchanged(self) -> bool:
        return True

    def abandon(self, connection: socket.socket) -> None:
        raise AssertionError("no probe waits at the end")

    def close(self) -> None:
        """Nothing to close."""

    def accept_and_reset(self, probe: Probe) -> None:
        accepted, _ = self._listening.accept()
        self.is_waiting = False
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        accepted.close()
        connection = probe.connection
        assert connection is not None
        eventually(lambda: is_closed(connection), "the reset")


def is_closed(connection: socket.socket) -> bool:
    """Return whether the kernel has got the reset, without reading the error."""
    tcp_close = 7  # TCP_CLOSE of linux/tcp_states.h, the first byte of struct tcp_info
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0] == tcp_close


@pytest.mark.parametrize("checks", [0, 1, 3])
def test_a_server_that_resets_what_it_accepts_has_accepted(checks: int) -> None:
    """However often each probe has found its connection waiting before."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        loop, server = Loop(), Server(listening)
        got: list[Verdict] = []
        probe = Probe(cast("Any", loop), lambda generation, listener: cast("Any", server))
        for _ in range(3):
            probe.send(cast("Any", None), ProbeSpec("accept"), 60, got.append)
            for _ in range(checks):
                loop.run_next()
            server.accept_and_reset(probe)
            loop.run_next()
        probe.close()

    assert [each.kind for each in got] == [verdicts.REFUSED, verdicts.GOOD, verdicts.GOOD]
