"""The port that leads a check's command to a generation: who gets through, and what is logged."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon import prober_client
from socketprotector.daemon.check_probe import CheckProbes
from socketprotector.daemon.delivery.probe_target import SHUT_DOWN, ProbeTarget
from socketprotector.system import peer_credentials, sock_diag
from socketprotector.system.loop import Loop
from tests.boundary.ending import turn
from tests.running import DEADLINE_S, eventually


class World:
    """One generation, and the connections that reach it."""

    def __init__(self, loop: Loop, **target: Any) -> None:
        self.loop, self.given = loop, list[socket.socket]()
        self.lines: list[tuple[str, str, dict[str, object]]] = []
        self.generation = cast(
            "Any",
            SimpleNamespace(
                record=SimpleNamespace(number=2),
                program=SimpleNamespace(identity=None),
                note_probe=lambda: None,
            ),
        )
        log = SimpleNamespace(write=lambda *words, **fields: self.lines.append((*words, fields)))
        target = {"give": self.given.append, **target}
        self.probes = CheckProbes(
            loop,
            cast("Any", log),
            lambda *_: ProbeTarget(("127.0.0.1", 1), None, lambda _: False, lambda: None, **target),
        )

    def connect(self) -> socket.socket:
        host, _, port = self.probes.address(self.generation).rpartition(":")
        return socket.create_connection((host, int(port)), DEADLINE_S)

    def until(self, given: int) -> None:
        def came() -> bool:
            turn(self.loop)
            return len(self.given) == given

        eventually(came, f"{given} connections")


def is_closed(client: socket.socket) -> bool:
    return client.recv(1) == b""


def test_only_root_and_the_commands_user_get_through(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, mine = World(loop), os.geteuid()
    users = [None, mine + 1, 0, mine]
    monkeypatch.setattr(sock_diag, "peer_user", lambda _: users.pop(0))
    with ExitStack() as stack:
        clients = [stack.enter_context(world.connect()) for _ in range(4)]
        world.until(2)
        for each in world.given:
            stack.enter_context(each).sendall(b"x")
        assert [is_closed(each) for each in clients] == [True, True, False, False]
    world.probes.release_all()


def test_without_a_free_descriptor_a_connection_waits(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(loop)
    with world.connect():
        [(_, address)] = world.probes._open.values()
        listening = address._listening

        def fails() -> None:
            raise OSError(errno.EMFILE, "too many")

        full = SimpleNamespace(accept=fails, fileno=listening.fileno, close=listening.close)
        monkeypatch.setattr(address, "_listening", full)
        address._accept()
        assert not world.given
        monkeypatch.setattr(address, "_listening", listening)
        world.until(1)
        world.given[0].close()
    world.probes.release_all()


def test_there_is_no_port_where_the_user_of_a_connection_is_unknown(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(loop)
    with monkeypatch.context() as patch:
        patch.setattr(peer_credentials, "unmistakable_users", lambda _: {-1})
        with pytest.raises(OSError, match="has no number of its own"):
            world.probes.address(world.generation)

    def fails(*_: object) -> None:
        raise OSError(errno.EPROTONOSUPPORT, "no protocol")

    monkeypatch.setattr(sock_diag, "listening", fails)
    with pytest.raises(OSError, match="the kernel does not report who connects"):
        world.probes.address(world.generation)
    assert world.probes._open == {}


def test_that_no_prober_starts_is_logged(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the operator sees only a check that fails, or hangs."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(prober_client, "Prober", fails)
    world = World(loop, give=None)
    with world.connect() as client:
        while not world.lines:
            turn(loop)
        assert is_closed(client)
    why = "the prober cannot be started: no more processes"
    assert world.lines == [("warning", "check-unreachable", {"generation": 2, "reason": why})]
    world.probes.release_all()


def test_a_command_that_may_have_reached_another_generation_counts_for_nothing(
    loop: Loop,
) -> None:
    """The next command gets another address."""
    unchanged = [False]
    world = World(loop, is_unchanged=lambda: unchanged[0])
    probes, generation = world.probes, world.generation

    first = probes.address(generation)
    assert probes.address(generation) == first
    assert probes.judge(generation, "") == SHUT_DOWN
    unchanged[0] = True
    assert probes._open == {}
    probes.address(generation)
    assert probes.judge(generation, "") == ""
    assert probes.judge(generation, "no") == "no"
    probes.release_all()
    assert probes.judge(generation, "") == ""
