"""What the control socket's commands do where the real protector does not get to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon.control.commands import CommandHandler
from socketprotector.model.control_requests import Request, RequestError


class Log:
    level = "info"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, level: str, event: str, **fields: object) -> None:
        self.lines.append(f"{level} {event} {fields['command']}")


def operator(log: Log) -> CommandHandler:
    """One whose every look at anything fails."""
    supervisor = cast("Any", SimpleNamespace(effects=SimpleNamespace()))
    runtime = cast("Any", SimpleNamespace(log=log))
    return CommandHandler(supervisor, runtime)


@pytest.mark.parametrize("command", ["status", "history", "connections", "crashes"])
def test_a_fault_of_ours_while_looking_ends_nothing(command: str) -> None:
    log = Log()

    with pytest.raises(RequestError) as caught:
        operator(log).handle(cast("Any", None), Request(command, {}, 7))

    assert (caught.value.code, caught.value.id) == ("failed", 7)
    assert log.lines == [f"error command-failed {command}"]


def test_a_fault_of_ours_while_something_is_changed_is_not_hidden() -> None:
    """The next program goes on from what is written down."""
    with pytest.raises(AttributeError):
        operator(Log()).handle(cast("Any", None), Request("scale", {"to": 2}))
