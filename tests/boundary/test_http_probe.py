"""HTTP probes that get no whole answer in time, with a loop that the test turns."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from socketprotector.daemon.delivery.probe_target import ProbeTarget
from socketprotector.daemon.probe import Probe
from socketprotector.daemon.verdicts import BAD, GOOD, UNTAKEN, Verdict
from socketprotector.model.probe_spec import ProbeSpec
from socketprotector.system.loop import READ
from tests.running import DEADLINE_S

LATE = "GET /: no answer within 1m"


class Loop:
    """Keeps one timer and one watch, until the test runs them."""

    def __init__(self) -> None:
        self._late: Callable[[], None] | None = None
        self._watch: tuple[int, Callable[[], None], int] | None = None

    @property
    def is_idle(self) -> bool:
        return self._late is None and self._watch is None

    def call_after(self, key: object, delay_s: float, call: Callable[[], None]) -> None:
        self._late = call

    def cancel(self, key: object) -> None:
        self._late = None

    def watch(self, fd: int, callback: Callable[[], None], events: int = READ) -> None:
        self._watch = fd, callback, events

    rewatch = watch

    def unwatch(self, fd: int) -> None:
        self._watch = None

    def turn(self) -> None:
        """Wait for the watched connection."""
        assert self._watch is not None
        fd, callback, events = self._watch
        waiting = select.poll()
        waiting.register(fd, events)
        assert waiting.poll(DEADLINE_S * 1000)
        callback()

    def end(self) -> None:
        """Let the time pass."""
        assert self._late is not None
        call, self._late = self._late, None
        call()


class Probed:
    """A server, and the probes of it."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._waits = True
        self.loop = Loop()
        self.got: list[Verdict] = []
        address = self._listening.getsockname()
        target = ProbeTarget(address, None, lambda _: self._waits, lambda: None)
        self.probe = Probe(cast("Any", self.loop), lambda *_: target)
        self._accepted: list[socket.socket] = []

    def send(self) -> None:
        self.probe.send(cast("Any", None), ProbeSpec("http", path="/"), 60, self.got.append)

    def accept(self, answer: bytes = b"") -> None:
        self._waits = False
        accepted, _ = self._listening.accept()
        self._accepted.append(accepted)
        accepted.settimeout(DEADLINE_S)
        if answer:
            assert accepted.recv(4096).startswith(b"GET / HTTP/1.1\r\n")
            accepted.sendall(answer)

    def close(self) -> None:
        self.probe.close()
        for each in (*self._accepted, self._listening):
            each.close()


@pytest.fixture
def probed() -> Iterator[Probed]:
    one = Probed()
    yield one
    one.close()
    assert one.loop.is_idle


def test_no_answer_is_bad_once_a_worker_has_accepted(probed: Probed) -> None:
    probed.send()
    probed.loop.turn()
    probed.accept()
    probed.loop.end()
    assert probed.got == [Verdict(BAD, LATE)]
    assert probed.probe.connection is None


def test_a_bad_status_is_reported_although_its_body_is_late(probed: Probed) -> None:
    probed.send()
    probed.loop.turn()
    probed.accept(b"HTTP/1.1 500 Oh\r\nContent-Length: 5\r\n\r\n")
    probed.loop.turn()
    assert probed.got == []
    probed.loop.end()
    assert probed.got == [Verdict(BAD, "GET /: 500, Oh")]


def test_a_probe_that_waits_for_a_worker_keeps_its_connection_and_is_not_watched(
    probed: Probed,
) -> None:
    """The next probe sends no second request, until a worker has accepted the first."""
    probed.send()
    probed.loop.turn()
    probed.loop.end()
    kept = probed.probe.connection
    assert kept is not None
    assert probed.loop.is_idle
    probed.send()
    assert probed.got == [Verdict(UNTAKEN, LATE)] * 2
    probed.accept(b"HTTP/1.1 500 Late\r\n\r\n")

    probed.send()
    assert probed.probe.connection is not kept
    probed.loop.turn()
    probed.accept(b"HTTP/1.1 200 OK\r\n\r\n")
    probed.loop.turn()
    assert probed.got[2:] == [Verdict(GOOD)]


def test_after_close_nothing_is_watched_or_reported(probed: Probed) -> None:
    probed.send()
    probed.loop.turn()
    probed.probe.close()
    assert probed.loop.is_idle
    assert probed.got == []
