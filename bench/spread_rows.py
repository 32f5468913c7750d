"""The line of the table about a spread: how many WebSockets come back at a time after a reload."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import sysconfig
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from bench.figures import Figure, Scale
from bench.processes import CannotMeasure, Started, free_port

_OURS = str(Path(sysconfig.get_path("scripts")) / "SocketProtector")
_REQUEST = (
    b"GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
_CLOSE, _PING, _PONG, _MASKED = 0x88, 0x89, 0x8A, 0x80
#: How many handshakes are under way at a time, when all connect.
_AT_ONCE = 100
#: At most so many times the even rate may come back in any sixtieth of the time.
_MOST = 1.3
_WINDOWS = 60
_LATE_S = 60.0


class _Web(Started):
    def _ask(self) -> None:
        with socket.create_connection(_place(self.address), 10) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            if not client.recv(100):
                raise ConnectionResetError("no answer")


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


class _Clients:
    """WebSockets that answer a ping and connect again as soon as they are closed."""

    def __init__(self, address: str, count: int) -> None:
        self._address = _place(address)
        self._epoll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        self._read: dict[int, bytes] = {}
        self._under_way: set[int] = set()
        #: When each closed one came back, how it was closed, and how often that was refused.
        self.returned: list[float] = []
        self.codes: Counter[int] = Counter()
        self.refused = 0
        for _ in range(count):
            self._connect()
            while len(self._under_way) >= _AT_ONCE:
                self.turn()
        while self._under_way:
            self.turn()

    def close(self) -> None:
        for each in self._open.values():
            each.close()
        self._epoll.close()

    def _connect(self) -> None:
        while True:
            client = socket.socket()
            try:
                client.connect(self._address)
                client.sendall(_REQUEST)
                break
            except OSError:
                self.refused += 1
                client.close()
        client.setblocking(False)
        number = client.fileno()
        self._open[number], self._read[number] = client, b""
        self._under_way.add(number)
        self._epoll.register(number, select.EPOLLIN)

    def turn(self) -> None:
        """Handle what has come, or wait a tenth of a second."""
        for number, _ in self._epoll.poll(0.1, 1000):
            client = self._open[number]
            try:
                data = client.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if data:
                self._read[number] = self._handle(number, self._read[number] + data)
            else:
                self._return(number)

    def _return(self, number: int) -> None:
        left = self._read.pop(number)
        closed = left[:1] == bytes((_CLOSE,))
        self.codes[int.from_bytes(left[2:4], "big") if closed else 1006] += 1
        self._epoll.unregister(number)
        self._under_way.discard(number)
        self._open.pop(number).close()
        self.returned.append(time.monotonic())
        self._connect()

    def _handle(self, number: int, data: bytes) -> bytes:
        if number in self._under_way:
            head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                return head
            if b" 101 " not in head:
                raise CannotMeasure(f"no WebSocket: {head[:80]!r}")
            self._under_way.discard(number)
        while len(data) >= 2 and data[0] == _PING and len(data) >= 2 + data[1]:
            said, data = data[2 : 2 + data[1]], data[2 + data[1] :]
            # Masked by zeros.
            pong = bytes((_PONG, _MASKED | len(said), 0, 0, 0, 0)) + said
            self._open[number].send(pong)
        return data


def _most_in(times: list[float], seconds: float) -> int:
    """Return how many of the times are within so many seconds of one another, at most."""
    most = first = 0
    for last, at in enumerate(times):
        while at - times[first] >= seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def _reloaded(count: int, seconds: float, *options: str) -> tuple[_Clients, float]:
    """Reload beside so many clients; return them when all have come back, and when it began."""
    address = f"127.0.0.1:{free_port()}"
    limit = ("--limit", f"nofile={count + 1000}", "--drain-timeout", "1h")
    app = [sys.executable, "-m", "socketprotector_client.run", "bench.websocket_app:app"]
    with _Web([_OURS, "-f", *limit, *options, address, "--", *app], address, {}, []) as started:
        clients = _Clients(address, count)
        try:
            until = time.monotonic() + 2.0  # by then all are idle
            while time.monotonic() < until:
                clients.turn()
            began = time.monotonic()
            os.kill(started.pid, signal.SIGHUP)
            while len(clients.returned) < count:
                clients.turn()
                if time.monotonic() > began + seconds + _LATE_S:
                    raise CannotMeasure(f"only {len(clients.returned):,} came back")
            return clients, began
        finally:
            clients.close()


def spread(scale: Scale) -> list[Figure]:
    """WebSockets that come back in any sixtieth of --drain-spread, and without it."""
    if find_spec("uvicorn") is None or find_spec("wsproto") is None:
        raise CannotMeasure("uvicorn and wsproto are not installed")
    seconds, count = scale(600, 30), int(scale(10_000, 600))
    window_s = seconds / _WINDOWS
    evenly, _ = _reloaded(count, seconds, "--drain-spread", f"{seconds:g}")
    storm, _ = _reloaded(count, seconds)
    most, even = _most_in(evenly.returned, window_s), count / _WINDOWS
    took = storm.returned[-1] - storm.returned[0]
    whole = evenly.returned[-1] - evenly.returned[0]
    return [
        Figure(
            f"{count:,} idle WebSockets that come back at once, --drain-spread {seconds:g}s: most "
            f"in any {window_s:g} s / the even rate",
            f"{most / even:.2f}: {most} of {even:.0f}",
            f"<= {_MOST}",
            "1.0",
            most <= _MOST * even,
            [
                f"the last one came {whole:.1f} s after the first; close codes {_said(evenly)}",
                f"without it: all {count:,} in {took:.1f} s, {_most_in(storm.returned, 1.0):,} of "
                f"them in one second; close codes {_said(storm)}",
                f"refused: {evenly.refused} and {storm.refused}",
            ],
        )
    ]


def _said(clients: _Clients) -> str:
    return ", ".join(f"{code} ({count:,})" for code, count in clients.codes.most_common())
