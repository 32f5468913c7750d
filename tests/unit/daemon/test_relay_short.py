"""What follows when the relay has no free descriptor for a message."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from socketprotector.daemon.relay_client import LogRelay

from .clock import Clock


class World:
    """A relay's end of the line, and this process in the place of the relay's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        named: Any = {}
        self.relay = LogRelay("web", "lines", self.clock.use_in(patch), named, prefixed=False)
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.settimeout(0)
        helper: Any = SimpleNamespace(process=SimpleNamespace(pid=os.getpid()))
        self.relay._helper = helper
        self.relay._watch_line(self.ours)

    def refuse(self, text: bytes) -> None:
        """Return a message, as a relay does that cannot receive its descriptor."""
        self.theirs.send(text)
        self.clock.watched[self.ours.fileno()]()

    def received(self) -> list[bytes]:
        found: list[bytes] = []
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(self.theirs, 100, 1)
            except BlockingIOError:
                return found
            found.append(text)
            for each in fds:
                os.close(each)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    yield made
    made.ours.close()
    made.theirs.close()
    made.relay._output_ready.close()


def test_each_message_is_repeated_and_the_operator_is_warned_once(world: World) -> None:
    for _ in range(3):
        world.refuse(b"=0")

    assert world.clock.lines == ["relay-short"]
    assert world.received() == []
    world.clock.pass_time(60.0)
    assert world.received() == [b"=0"] * 3
