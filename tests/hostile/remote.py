"""A remote client of the exporter, its page and its agent, which is a bad one in every way."""

from __future__ import annotations

import contextlib
import http.client
import re
import select
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

from tests.running import DEADLINE_S, eventually
from tests.unit.exporter.conftest import Exporter

_PIECE = 16_384
_PAGE = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
_METRICS = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n"
_EVENTS = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
#: What a connection sends first, and then repeatedly; a cut connection is replaced.
BEHAVIOURS = {
    "silence": (b"", b""),
    "half a head": (_METRICS, b""),
    "a head byte by byte": (_PAGE + b"X: ", b"a"),
    "a head without end": (_PAGE + b"X: ", b"a" * _PIECE),
    "lines without end": (_METRICS, b"X-A: b\r\n" * (_PIECE // 8)),
    "a line without end": (b"", b"a" * _PIECE),
    "a body without end": (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
        b"x" * _PIECE,
    ),
    "chunks without end": (
        _PAGE + b"Transfer-Encoding: chunked\r\n\r\n",
        b"5\r\nxxxxx\r\n" * (_PIECE // 10),
    ),
    "many requests, no answer read": (b"", (_PAGE + b"\r\n") * 100),
    "viewers that read nothing": (_EVENTS, b""),
    "viewers with a body without end": (
        _EVENTS[:-2] + b"Transfer-Encoding: chunked\r\n\r\n",
        b"5\r\nxxxxx\r\n" * (_PIECE // 10),
    ),
    "names without an answer": (b"nowhere\n" * 100, b""),
    "odd methods": (
        b"".join(
            each + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n"
            for each in (b"BREW", b"CONNECT", b"TRACE", b"PRI", b"get", b"\xff", b"PUT", b"M" * 99)
        ),
        b"",
    ),
    "wrong heads": (
        b"GET\r\n\r\nGET / HTTP/9.9\r\n\r\n\0\0\r\n\r\nGET /%00%ff/../ HTTP/1.1\r\n: x\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\nContent-Length: x\r\n\r\n",
    ),
    "something else": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), bytes(100)),
}
#: Of each behaviour at each address.
CONNECTIONS = 8
_PAUSE_MS = 20


def addresses(exporter: Exporter) -> list[tuple[str, int]]:
    """Return where /metrics, the page and the agent are."""
    agent = exporter.said.wait_for("agent-checks at")
    found = []
    for text in (exporter.address, exporter.page, agent):
        match = re.search(r"([0-9.]+):(\d+)$", text)
        assert match, text
        found.append((match[1], int(match[2])))
    return found


class _Connections:
    """Those of one behaviour to one address."""

    def __init__(self, address: tuple[str, int], name: str) -> None:
        self._address = address
        self._first, self._more = BEHAVIOURS[name]
        self._open: list[socket.socket] = []

    def turn(self) -> None:
        """Send more, and replace cut connections; those of the flood do not count."""
        for one in self._open[:]:
            try:
                if self._more:
                    one.send(self._more)
                if "no answer" not in self._first.decode("latin-1") and self._ended(one):
                    raise ConnectionResetError
            except BlockingIOError:
                continue
            except OSError:
                one.close()
                self._open.remove(one)
        if len(self._open) < CONNECTIONS:
            one = socket.socket()
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(self._address)
            self._open.append(one)
            with contextlib.suppress(OSError):  # sent with the next turn
                select.select([], [one], [], 0.05)
                one.send(self._first)

    @staticmethod
    def _ended(one: socket.socket) -> bool:
        try:
            return one.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        for one in self._open:
            one.close()


@contextmanager
def attack(exporter: Exporter, names: Iterable[str] = BEHAVIOURS) -> Iterator[None]:
    """Behave like this at all three addresses, for as long as the block; it has begun there."""
    every = [_Connections(each, name) for each in addresses(exporter) for name in names]
    ending, turned = threading.Event(), threading.Event()

    def run() -> None:
        for turn in count():
            for each in every:
                each.turn()
            if turn > CONNECTIONS:
                turned.set()
            if ending.wait(_PAUSE_MS / 1000):
                break
        for each in every:
            each.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert turned.wait(DEADLINE_S)
        yield
    finally:
        ending.set()
        thread.join()


def _is_shown(page: tuple[str, int], name: str) -> bool:
    """Say whether the page's first events have an instance by name, and what it says."""
    with socket.create_connection(page, DEADLINE_S) as viewer:
        viewer.sendall(_EVENTS)
        found = b""
        while b'"name"' not in found or b"event: state" not in found:
            piece = viewer.recv(65536)
            if not piece:
                return False
            found += piece
        return b'"name":"%b"' % name.encode() in found.replace(b": ", b":")


def is_answered(exporter: Exporter, name: str) -> None:
    """See that /metrics, /readyz, the page and the agent answer a good client about an instance.

    A connection may have to give its place to a later one: then a client asks again.
    """
    metrics, page, agent = addresses(exporter)

    def body_of(address: tuple[str, int], path: str) -> str:
        where = f"http://{address[0]}:{address[1]}{path}"
        with urllib.request.urlopen(where, timeout=DEADLINE_S) as answer:
            return str(answer.read().decode())

    def advice() -> str:
        with socket.create_connection(agent, DEADLINE_S) as line:
            line.sendall(name.encode() + b"\n")
            return b"".join(iter(lambda: line.recv(4096), b"")).decode()

    up = f'socketprotector_up{{instance="{name}"}} 1.0'
    answers: dict[str, Callable[[], bool]] = {
        "/metrics": lambda: up in body_of(metrics, "/metrics"),
        "/readyz": lambda: body_of(metrics, f"/readyz/{name}") == "ok\n",
        "the page": lambda: "<html" in body_of(page, "/"),
        "the page's events": lambda: _is_shown(page, name),
        "the agent": lambda: advice().startswith("up "),
    }

    def is_good(answer: Callable[[], bool]) -> bool:
        try:
            return answer()
        except (OSError, http.client.HTTPException):
            return False

    # One after the other: on a busy machine all in a row may be one too many for each try.
    for what, answer in answers.items():
        eventually(partial(is_good, answer), f"a good answer of {what}", 3 * DEADLINE_S)
