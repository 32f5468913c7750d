"""--settle-check: how long an answer is awaited, and what is said where none comes."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import Event, SettleFailed
from socketprotector.daemon import probe, settle_check, verdicts
from socketprotector.daemon.delivery.probe_target import SHUT_DOWN, ProbeTarget
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.settle_check import SettleCheck
from socketprotector.system.loop import Loop
from tests.boundary.ending import SHELL, settle
from tests.running import DEADLINE_S

pytestmark = pytest.mark.usefixtures("in_root_directory")

TIMER = "settle-check"


class Settling:
    """Generation 2, which settles, and what was posted of it."""

    def __init__(
        self, loop: Loop, asked: str, reach: Callable[..., object], *, holds: bool = True
    ) -> None:
        self._loop = loop
        self.posted: list[Event] = []
        probes = SimpleNamespace(
            address=lambda _: "",
            release=lambda _: None,
            judge=lambda _, why: why if holds else SHUT_DOWN,
        )
        runtime = Runtime(loop, cast("Any", None), self._post, lambda: True)
        self.check = SettleCheck(runtime, cast("Any", reach), cast("Any", probes), dict)
        program = replace(SHELL, environment=(("PATH", os.environ["PATH"]),), settle_check=asked)
        generation = SimpleNamespace(program=program, record=SimpleNamespace(number=2))
        self.check.begin(cast("Any", generation))

    def _post(self, event: Event) -> None:
        self.posted.append(event)
        self._loop.running = False

    def fails(self) -> str:
        """Run the loop until it does; return why."""
        self._loop.call_after("never", DEADLINE_S, lambda: self._post(SettleFailed(0, "never")))
        self._loop.run()
        self._loop.cancel("never")
        [failed] = self.posted
        assert isinstance(failed, SettleFailed)
        assert failed.generation == 2
        assert self._loop.due(TIMER) is None
        settle(self._loop)
        return failed.reason.removeprefix("--settle-check: ")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle_check, "LIMIT_S", 0.3)
    monkeypatch.setattr(settle_check, "_ANSWER_LIMIT_S", 0.3)
    monkeypatch.setattr(verdicts, "_AGAIN_S", 0.01)
    monkeypatch.setattr(verdicts, "INCONCLUSIVE_S", 0.3)
    monkeypatch.setattr(probe, "_PROBER_S", 0.0)


@pytest.mark.usefixtures("soon")
def test_one_that_takes_too_long_is_killed(loop: Loop) -> None:
    settling = Settling(loop, "sleep 1000", lambda *_: None)

    assert settling.fails() == "sleep: no answer within 300ms"


@pytest.mark.usefixtures("soon")
def test_what_cannot_be_asked_is_as_bad(loop: Loop) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    assert Settling(loop, "http:/", none).fails().startswith("Too many open files")


class Probers:
    """Stand-in for prober_client.Prober: processes that answer, or are stuck until killed."""

    def __init__(self, loop: Loop, answer: bytes) -> None:
        """answer: from the server; b"": the processes are stuck."""
        self._loop, self._answer = loop, answer
        self.started = 0

    def __call__(self, loop: Loop, *, answered: Any, ended: Any, **_: object) -> object:
        self.started += 1

        def send(*_: object, **__: object) -> socket.socket:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with theirs:
                theirs.sendall(self._answer)
            if self._answer:
                loop.call_after("answer", 0.0, lambda: answered(""))
            return ours

        return SimpleNamespace(
            send=send,
            kill=lambda: ended("was killed by SIGKILL"),
            close=lambda: loop.cancel("answer"),
        )


@pytest.fixture
def way() -> Iterator[ProbeTarget]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield ProbeTarget(listening.getsockname(), None, lambda _: False, lambda: None)


@pytest.mark.usefixtures("soon")
def test_what_hangs_is_killed_and_as_bad(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, way: ProbeTarget
) -> None:
    """Also where it could not be asked at first: that is no reason later."""
    probers = Probers(loop, b"")
    monkeypatch.setattr(probe, "Prober", probers)
    tries: list[int] = []

    def later(*_: object) -> object:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return way

    said = Settling(loop, "https:/", later).fails()

    assert said == "the probe process was killed by SIGKILL"
    assert (len(tries), probers.started) == (3, 1)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("good", [True, False])
def test_what_another_generation_has_answered_is_neither_good_nor_bad(
    loop: Loop, good: bool
) -> None:
    """Its socket is shut down again and again, and the kernel gives the question to the other."""
    settling = Settling(loop, "true" if good else "false", lambda *_: None, holds=False)
    assert settling.check.note_settle_over(2)
    assert settling.fails() == SHUT_DOWN


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("status", [b"200", b"500"])
def test_nor_what_it_has_answered_by_http(
    loop: Loop, status: bytes, monkeypatch: pytest.MonkeyPatch, way: ProbeTarget
) -> None:
    monkeypatch.setattr(probe, "Prober", Probers(loop, b"HTTP/1.1 %s -\r\n\r\n" % status))
    way.is_unchanged = lambda: False
    settling = Settling(loop, "https:/", lambda *_: way)
    assert settling.check.note_settle_over(2)
    assert settling.fails() == SHUT_DOWN


@pytest.mark.usefixtures("soon")
def test_a_verdict_ends_the_probers_copy_of_the_connection(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, way: ProbeTarget
) -> None:
    """Otherwise connections would pile up at a server whose answers do not end."""
    monkeypatch.setattr(probe, "Prober", Probers(loop, b"HTTP/1.1 500\r\n\r\nand so on"))
    connect = way.connecting
    with ExitStack() as closing:

        def connecting() -> socket.socket:
            one = connect()
            copies.append(closing.enter_context(one.dup()))
            return one

        copies: list[socket.socket] = []
        monkeypatch.setattr(way, "connecting", connecting)
        assert Settling(loop, "https:/", lambda *_: way).fails() == 'GET /: 500, "and so on"'
        [copy] = copies
        assert copy.recv(1) == b""


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("frees", [True, False])
def test_a_full_backlog_at_a_unix_path_is_waited_for_as_long_as_over_tcp(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, frees: bool
) -> None:
    """The kernel waits with no one's connect() there: a burst of clients must not roll back."""
    monkeypatch.setattr(probe, "Prober", Probers(loop, b"HTTP/1.1 500\r\n\r\n"))
    path, tries = str(tmp_path / "s"), itertools.count(1)
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(path)
        listening.listen(0)
        client.connect(path)
        way = ProbeTarget((path, 0), None, lambda _: False, lambda: None)
        make = way.connecting

        def connecting() -> socket.socket:
            if next(tries) == 3 and frees:
                listening.accept()[0].close()
            return make()

        monkeypatch.setattr(way, "connecting", connecting)

        said = Settling(loop, "https:/", lambda *_: way).fails()

    assert said == ("GET /: 500, no text" if frees else "GET /: the socket's backlog is full")
    assert next(tries) > 3
