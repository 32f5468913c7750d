"""--health by a command: how many there are at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon.health import Health
from socketprotector.daemon.runtime import Runtime
from socketprotector.daemon.verdicts import UNHEALTHY
from socketprotector.model.history import History
from socketprotector.system.loop import Loop
from socketprotector.system.process import Process
from tests.boundary.ending import SHELL, children, settle, until

pytestmark = pytest.mark.usefixtures("in_root_directory")


def asked(loop: Loop, command: str, written: list[History]) -> Health:
    """Return what is known of generation 1, which is asked by this command.

    written: gets the history whenever the state is written.
    """
    kept = [History()]

    def remember(change: Callable[[History], History]) -> None:
        kept[0] = change(kept[0])

    def persist() -> bool:
        written.append(kept[0])
        return True

    log = SimpleNamespace(write=lambda *_, **__: None)
    its = SimpleNamespace(
        health=f"check:{command}", health_every_s=0.02, health_failures=3, health_timeout_s=0.1
    )
    way = SimpleNamespace(
        text="127.0.0.1:1", give=None, close=lambda: None, is_unchanged=lambda: True
    )
    health = Health(
        Runtime(loop, cast("Any", log), lambda _: None, persist),
        settings=lambda: cast("Any", its),
        delivery=cast("Any", SimpleNamespace(reach=lambda *_, **__: way, is_silent=False)),
        remember=remember,
        has_ready=lambda _: True,
    )
    program = replace(SHELL, environment=(("PATH", os.environ["PATH"]),))
    generation = SimpleNamespace(program=program, record=SimpleNamespace(number=1))
    health.set_serving(cast("Any", generation))
    return health


def test_beside_one_that_cannot_be_killed_no_other_is_started(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has become another user's.  As long as it lives there is no answer, which is a bad one."""

    def anothers(process: Process) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(Process, "kill_group", anothers)
        written: list[History] = []
        health = asked(loop, "exec sleep 1000", written)
        until(loop, lambda: health.results.failures >= 5)
        assert (health.results.state, health.results.last) == (
            UNHEALTHY,
            "sleep: no answer within 100ms",
        )
        assert [each.result for each in written[-1].health] == [UNHEALTHY]
        assert written[-1].health[-1].reason == health.results.last
        [first] = children()

        os.kill(first, signal.SIGKILL)
        until(loop, lambda: children() not in ({first}, set()))
    health.suspend()
    settle(loop)
