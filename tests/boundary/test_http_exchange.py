"""An HTTP request through the event loop, and what comes back."""

from __future__ import annotations

import errno
import socket
import threading
from contextlib import closing, suppress

import pytest

from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.daemon.http_exchange import HttpExchange, request
from socketprotector.system.loop import Loop
from tests.boundary.serving import reset, serving
from tests.running import DEADLINE_S
from tests.together import together

HTTP = b"HTTP/1.1 "
LONG = b"GET /" + b"x" * 10_000_000


def connecting(address: tuple[str, int]) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex(address)
    return connection


class Verdicts(list[str]):
    """What an exchange reports; a report stops the loop."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def done(self, why: str) -> None:
        self.append(why)
        self._loop.running = False


def verdicts(loop: Loop, address: tuple[str, int], text: bytes = b"GET /") -> list[str]:
    """Run one exchange to its end."""
    found = Verdicts(loop)
    with connecting(address) as connection:
        exchange = HttpExchange(loop, connection, text, (200,), found.done)
        loop.call_after("too long", DEADLINE_S, lambda: pytest.fail("no verdict"))
        loop.run()
        loop.cancel("too long")
        loop.watch(connection.fileno(), loop.close)  # fails if the exchange still watches it
        loop.unwatch(connection.fileno())
        exchange.close()
    return found


def test_a_good_answer_ends_the_exchange_while_the_server_sends_more(loop: Loop) -> None:
    def serve(connection: socket.socket) -> None:
        assert connection.recv(100) == b"GET /"
        connection.sendall(HTTP + b"200 OK\r\n\r\n")
        with suppress(OSError):
            while True:
                connection.sendall(bytes(65536))

    with serving(serve) as address:
        assert verdicts(loop, address) == [""]


def test_a_close_within_the_header_is_reported(loop: Loop) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(HTTP + b"200")
        connection.close()

    with serving(serve) as address:
        assert verdicts(loop, address) == ["closed within its header"]


def test_a_request_that_does_not_fit_into_the_buffer_is_sent_in_parts(loop: Loop) -> None:
    received = []

    def serve(connection: socket.socket) -> None:
        left = len(LONG)
        while left and (data := connection.recv(1 << 20)):
            left -= len(data)
        received.append(left)
        connection.sendall(HTTP + b"503 Busy\r\n\r\nnot now")

    with serving(serve) as address:
        assert verdicts(loop, address, LONG) == ['503, "not now"']
    assert received == [0]


@together(
    ("sent", "why"),
    [
        (b"", "Connection reset by peer"),
        (HTTP + b"200 OK\r\n", "Connection reset by peer"),
        (HTTP + b"500 Oh\r\nContent-Length: 5\r\n\r\n", "500, Oh"),
    ],
)
def test_a_reset_is_reported_unless_the_status_is_known(sent: bytes, why: str) -> None:
    read = threading.Event()

    class Reading(HttpExchange):
        """Lets the server reset the connection after the answer was read."""

        def _receive(self) -> None:
            super()._receive()
            read.set()

    def serve(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(sent)
        if sent:
            assert read.wait(DEADLINE_S)
        reset(connection)

    with closing(Loop()) as loop, serving(serve) as address, connecting(address) as connection:
        found = Verdicts(loop)
        exchange = Reading(loop, connection, b"GET /", (200,), found.done)
        loop.run()
        exchange.close()
    assert found == [why]


class Refused:
    """A connection whose connect() fails later, as it can from another machine."""

    def __init__(self, of: socket.socket) -> None:
        self.fileno = of.fileno

    def getsockopt(self, *_: object) -> int:
        return errno.ECONNREFUSED


def test_a_connection_that_is_refused_later_is_reported(loop: Loop) -> None:
    found = Verdicts(loop)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        HttpExchange(loop, Refused(ours), b"GET /", (200,), found.done)  # type: ignore[arg-type]
        loop.run()
    assert found == ["refused"]


def test_once_begun_an_exchange_does_not_fail_for_want_of_memory(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would count as a bad answer, and fail a settling generation."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    found = Verdicts(loop)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        HttpExchange(loop, ours, b"GET /", (200,), found.done)
        monkeypatch.setattr(loop, "watch", fails)
        theirs.sendall(HTTP + b"200 OK\r\n\r\n")
        loop.run()
    assert found == [""]


def test_after_close_nothing_is_reported(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        exchange = HttpExchange(loop, ours, b"GET /", (200,), pytest.fail)
        theirs.sendall(HTTP + b"200 OK\r\n\r\n")
        exchange.close()
        loop.watch(ours.fileno(), lambda: setattr(loop, "running", False))
        loop.run()
        loop.unwatch(ours.fileno())


# -- by the prober ------------------------------------------------------------------


@together(
    ("sent", "end", "why"),
    [
        (HTTP + b"200 OK\r\n\r\n", "Broken", ""),
        (HTTP + b"200 OK\r\n", "", "closed within its header"),
        (HTTP + b"200 OK\r\n", "no TLS: BAD_RECORD_MAC", "no TLS: BAD_RECORD_MAC"),
        (HTTP + b"500 Oh\r\nContent-Length: 9\r\n\r\n", "Connection reset by peer", "500, Oh"),
        (b"", "", "closed without an answer"),
        (b"", "refused", "refused"),
    ],
)
def test_the_prober_reports_how_its_connection_ended(sent: bytes, end: str, why: str) -> None:
    """Its socket's end alone decides nothing: the prober may have been killed."""
    for is_report_first in (False, True):
        found: list[str] = []
        ours, theirs = socket.socketpair()
        with closing(Loop()) as loop, ours, theirs:
            ours.setblocking(False)
            exchange = HttpExchange(loop, ours, b"", (200,), found.append)
            theirs.sendall(sent)
            theirs.close()
            if not is_report_first:
                exchange._receive()  # as the loop does
                assert found == ([""] if why == "" else [])
            if not found:
                exchange.end(end)
        assert found == [why]


def test_an_answer_by_the_prober_is_judged_when_it_comes(loop: Loop) -> None:
    found = Verdicts(loop)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(HTTP + b"500 Oh\r\nContent-Length: 9\r\n\r\n")
        exchange = HttpExchange(loop, ours, b"", (200,), found.done)
        exchange._receive()
        assert exchange.why_by_header == "500, Oh"
        theirs.sendall(b"too early")
        loop.run()
    assert found == ['500, "too early"']


# -- the request --------------------------------------------------------------------


@together(
    ("address", "shown"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 8080), "[::1]:8080"),
        (("fe80::1%eth0", 80), "[fe80::1]:80"),
        (("/run/s", 0), "localhost"),
    ],
)
def test_a_server_is_called_by_its_address(address: tuple[str, int], shown: str) -> None:
    assert ProbeTarget(address, None, lambda _: False, lambda: None).host_header == shown


def test_a_request_has_these_lines() -> None:
    assert request("/p?q=1", "shop.example") == (
        b"GET /p?q=1 HTTP/1.1\r\nHost: shop.example\r\nUser-Agent: SocketProtector\r\n"
        b"Accept: */*\r\nConnection: close\r\n\r\n"
    )
