"""Idle clients, and those with endless requests, take neither the page nor /metrics from others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvicorn
from socketprotector_exporter import visits
from socketprotector_exporter.collector import ProtectorCollector
from socketprotector_exporter.http import Server
from socketprotector_exporter.web import application
from socketprotector_exporter.web_hub import Hub

from tests.running import DEADLINE_S
from tests.unit.exporter.conftest import Exporter

Start = Callable[..., Exporter]
Connect = Callable[[str], socket.socket]
WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as opened:

        def make(address: str) -> socket.socket:
            host, _, port = address.rpartition("/")[2].rpartition(":")
            made = socket.create_connection((host, int(port)), DEADLINE_S)
            return opened.enter_context(made)

        yield make


def answers(address: str) -> int:
    with urllib.request.urlopen(address, timeout=DEADLINE_S) as answer:
        return int(answer.status)


def heard(client: socket.socket) -> bytes:
    """Return all that comes until the connection ends."""
    found = b""
    while True:
        try:
            piece = client.recv(65536)
        except ConnectionResetError:
            return found
        if not piece:
            return found
        found += piece


def test_more_idle_clients_than_places_take_nothing_from_others(
    exporter: Start, connect: Connect
) -> None:
    one = exporter("--web", "127.0.0.1:0")
    page, metrics = one.page, one.address
    fds = Path(f"/proc/{one.process.pid}/fd")
    idle = [connect(page) for _ in range(visits.PLACES + 60)]

    assert answers(f"{page}/") == 200
    assert answers(f"{metrics}/metrics") == 200
    assert len(os.listdir(fds)) < visits.PLACES + 40
    # Those that came first gave their places.
    assert heard(idle[0]) == b""
    last = idle[-1]
    last.sendall(WHOLE)
    assert last.recv(64).startswith(b"HTTP/1.1 200")


class Door:
    """The page with few places, in this test's own event loop."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))

    async def opened(self) -> visits.Visits:
        hub = Hub(list)
        config = uvicorn.Config(
            application(hub),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=3600,  # no limit of uvicorn's helps on
        )
        config.load()
        server = uvicorn.Server(config)
        found = visits.Visits(self.listening, config, server.server_state)
        found.watch()
        self.visits = found
        return found

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.listening.getsockname())


def run(story: Callable[[Door], object]) -> None:
    door = Door()
    try:
        asyncio.run(asyncio.wait_for(story(door), DEADLINE_S))  # type: ignore[arg-type]
    finally:
        door.listening.close()


def test_while_each_place_has_an_answer_nobody_is_closed_or_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(visits, "PLACES", 2)
    looks: list[visits.Visits] = []
    accept = visits.Visits._accept

    def counted(door: visits.Visits) -> None:
        looks.append(door)
        accept(door)

    monkeypatch.setattr(visits.Visits, "_accept", counted)

    async def story(door: Door) -> None:
        await door.opened()
        viewers = [await door.connect() for _ in range(2)]
        for reader, writer in viewers:
            writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"event: hello")
        third, to_third = await door.connect()  # by the kernel
        to_third.write(WHOLE)
        waiting = asyncio.create_task(third.readline())
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        assert len(looks) == 3, "it spins: a listener that is not accepted from stays readable"
        viewers[0][1].close()
        assert (await waiting).startswith(b"HTTP/1.1 200")
        for _, writer in [*viewers, (third, to_third)]:
            writer.close()

    run(story)


def test_who_has_been_waited_for_the_longest_gives_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, however long a request may take."""
    monkeypatch.setattr(visits, "PLACES", 2)
    monkeypatch.setattr(visits, "HEAD_S", 3600.0)

    async def story(door: Door) -> None:
        await door.opened()
        idle = []
        for number in (1, 2):
            idle.append(await door.connect())
            while len(door.visits._waited_for) < number:
                await asyncio.sleep(0)
        reader, writer = await door.connect()
        writer.write(WHOLE)

        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionResetError):
            assert await idle[0][0].read() == b""
        idle[1][1].write(WHOLE)
        assert (await idle[1][0].readline()).startswith(b"HTTP/1.1 200"), "the later one stays"
        for _, each in (*idle, (reader, writer)):
            each.close()

    run(story)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", WHOLE, WHOLE + b"GET"])
def test_a_request_that_does_not_come_is_waited_for_so_long(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(visits, "HEAD_S", 0.1)

    async def story(door: Door) -> None:
        await door.opened()
        reader, writer = await door.connect()
        writer.write(sent)
        try:
            assert (await reader.read()).startswith(b"HTTP/1.1 200" if WHOLE in sent else b"")
        except ConnectionResetError:
            pass
        writer.close()

    run(story)


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 99999999999\r\n\r\nx",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100,
    ],
    ids=["long", "chunks"],
)
def test_a_body_is_not_read_and_its_request_is_the_last(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    """To parse one that has no end would take the processor from all others."""
    monkeypatch.setattr(visits, "HEAD_S", 3600.0)

    async def story(door: Door) -> None:
        await door.opened()
        reader, writer = await door.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()

    run(story)


def test_an_accept_that_fails_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits, "_SHORT_S", 0.05)
    fails = [OSError(24, "too many open files")] * 2

    class Listening(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if fails:
                raise fails.pop()
            return super().accept()

    async def story(door: Door) -> None:
        door.listening = Listening(fileno=door.listening.detach())
        await door.opened()
        reader, writer = await door.connect()
        writer.write(WHOLE)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert not fails
        writer.close()

    run(story)


#: More than 16 KiB, and less than http.server would take: of several lines, or of one.
LONG = [(b"X-A: " + b"a" * 500 + b"\r\n") * 40, b"X-A: " + b"a" * 20_000]


@pytest.mark.parametrize("head", LONG, ids=["lines", "line"])
def test_a_head_of_more_than_16_kib_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, connect: Connect, head: bytes
) -> None:
    for name in ("http.CONNECTION_S", "bounded.CONNECTION_S", "visits.HEAD_S"):
        monkeypatch.setattr(f"socketprotector_exporter.{name}", 3600.0)

    async def story(door: Door) -> None:
        await door.opened()
        reader, writer = await door.connect()
        writer.write(b"GET / HTTP/1.1\r\n" + head)
        assert (await reader.readline()).startswith(b"HTTP/1.1 4")
        writer.close()

    run(story)
    with served() as server:
        client = connect(server.where)
        client.sendall(b"GET /metrics HTTP/1.1\r\n" + head)
        assert b" 200 " not in heard(client)


@contextmanager
def served() -> Iterator[Server]:
    """/metrics in this process."""
    with Server(("127.0.0.1", 0), ProtectorCollector(paths=["/none"]), None) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield server
        finally:
            server.shutdown()
            serving.join()


def test_a_head_that_comes_byte_by_byte_is_waited_for_so_long(
    monkeypatch: pytest.MonkeyPatch, connect: Connect
) -> None:
    monkeypatch.setattr("socketprotector_exporter.http.CONNECTION_S", 0.2)
    with served() as server:
        client = connect(server.where)
        client.settimeout(0.02)
        until = time.monotonic() + DEADLINE_S
        found = b""
        while not found:
            assert time.monotonic() < until, "it is waited for without an end"
            try:
                client.sendall(b"G")
                found = client.recv(4096) or b"closed"
            except TimeoutError:
                continue
            except OSError:
                found = b"closed"
        assert found == b"closed" or b" 431 " in found
