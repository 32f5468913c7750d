"""--settle-check: how long an answer is awaited, and what is said where none comes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import Event, SettleFailed
from socketprotector.daemon import settle_check
from socketprotector.daemon.asker_client import KeptAsker
from socketprotector.daemon.delivery.way import SHUT_DOWN
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.settle_check import SettleCheck
from socketprotector.system.loop import Loop
from tests.boundary.ending import SHELL, settle
from tests.running import DEADLINE_S

pytestmark = pytest.mark.usefixtures("in_root_directory")

LIMIT = "settle-check-limit"
WAY = SimpleNamespace(close=lambda: None, holds=lambda: True)


class Settling:
    """Generation 2, which settles, and what was posted of it."""

    def __init__(
        self, loop: Loop, asked: str, reach: Callable[..., object], *, holds: bool = True
    ) -> None:
        self._loop = loop
        self.posted: list[Event] = []
        probes = SimpleNamespace(
            address=lambda _: "",
            over=lambda _: None,
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
        assert self._loop.due(LIMIT) is None
        settle(self._loop)
        return failed.reason.removeprefix("--settle-check: ")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle_check, "LIMIT_S", 0.3)
    monkeypatch.setattr(settle_check, "_AGAIN_S", 0.01)


def test_a_commands_time_begins_with_it_and_not_with_the_last_answer(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle_check, "_EVERY_S", 0.0)
    tries, gate = tmp_path / "tries", tmp_path / "gate"
    os.mkfifo(gate)
    command = f"check:echo >>{tries}; test $(wc -l <{tries}) = 1 || {{ cat {gate}; false; }}"
    settling = Settling(loop, command, lambda *_: None)
    assert loop.due(LIMIT) is None

    def opened() -> None:
        try:
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))  # the second one reads there
        except OSError:
            loop.call_after("open", 0.01, opened)
        else:
            second.append(loop.due(LIMIT))

    second: list[float | None] = []
    opened()

    assert settling.fails() == "echo: exited with status 1"
    assert second == [None]


@pytest.mark.usefixtures("soon")
def test_one_that_takes_too_long_is_killed(loop: Loop) -> None:
    settling = Settling(loop, "sleep 1000", lambda *_: None)

    assert settling.fails() == "sleep: no answer within 300ms"


@pytest.mark.usefixtures("soon")
def test_what_cannot_be_asked_is_as_bad(loop: Loop) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    assert Settling(loop, "http:/", none).fails().startswith("Too many open files")


@pytest.mark.usefixtures("soon")
def test_what_could_not_be_asked_at_first_is_no_reason_later(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that asks hangs then, say."""
    hangs = SimpleNamespace(now=object(), close=lambda: None)
    monkeypatch.setattr(KeptAsker, "repeating", lambda *_: hangs)
    tries: list[int] = []

    def later(*_: object) -> object:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return WAY

    assert Settling(loop, "http:/", later).fails() == "no answer within 300ms"
    assert len(tries) == 3


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("good", [True, False])
def test_what_another_generation_has_answered_is_neither_good_nor_bad(
    loop: Loop, good: bool
) -> None:
    """Its socket is shut down again and again, and the kernel gives the question to the other."""
    settling = Settling(loop, "true" if good else "false", lambda *_: None, holds=False)
    assert settling.check.awaits(2)
    assert settling.fails() == SHUT_DOWN


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("why", ["", "GET /: 500, no text"])
def test_nor_what_it_has_answered_by_http(
    loop: Loop, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(loop: Loop, way: object, asked: object, heard: Any, ended: object) -> object:
        loop.call_after("answer", 0.0, lambda: heard(why))
        return SimpleNamespace(now=object(), close=lambda: loop.cancel("answer"))

    monkeypatch.setattr(KeptAsker, "repeating", begin)
    way = SimpleNamespace(close=lambda: None, holds=lambda: False)
    settling = Settling(loop, "http:/", lambda *_: way)
    assert settling.check.awaits(2)
    assert settling.fails() == SHUT_DOWN
