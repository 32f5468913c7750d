"""Speak with the control socket of a real protector, one line at a time."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import answers
from tests.procfs import environment_of
from tests.running import DEADLINE_S, WORKERS, Protector, eventually
from tests.scenarios.tools import worker

MANY = worker("many")
#: On the client library, so that it counts: obeys N lines at once.
OBEYS = (sys.executable, str(WORKERS / "obeys.py"))


def default_path(key: str) -> Path:
    """Where the control socket is if no path was given."""
    return Path(os.environ["XDG_RUNTIME_DIR"]) / "socketprotector" / f"{key}.control"


class Line:
    """One connection to a control socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.kept: list[dict[str, Any]] = []  # events that came before an answer
        self._asked = 0
        self._commands: dict[object, str] = {}  # by the number of the request

    def send(self, command: str, **arguments: Any) -> None:
        self._asked += 1
        self._commands[self._asked] = command
        request = {"v": 1, "id": self._asked, "command": command, **arguments}
        self.socket.sendall(json.dumps(request).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """Return the next line, an answer or an event that the schema describes; {} at the end."""
        line = self._lines.readline()
        if not line:
            return {}
        found: dict[str, Any] = json.loads(line)
        answers.check(self._commands.get(found.get("id")), found)
        return found

    def answer(self) -> dict[str, Any]:
        """Return the answer to the last request; events that come before are kept."""
        while "event" in (found := self.hear()):
            self.kept.append(found)
        assert found.get("id") == self._asked, found
        return found

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the result of what is done."""
        self.send(command, **arguments)
        found = self.answer()
        assert found["ok"], found
        result: dict[str, Any] = found["result"]
        return result

    def refused(self, command: str, **arguments: Any) -> tuple[str, str]:
        """Return code and words of what is not done."""
        self.send(command, **arguments)
        found = self.answer()
        assert not found["ok"], found
        return found["code"], found["error"]

    def event(self, *names: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event of one of these names and with these fields."""
        while True:
            found = self.kept.pop(0) if self.kept else self.hear()
            assert found, f"the end came before {names} {fields}"
            if found["event"] in names and fields.items() <= found.items():
                return found

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Operated:
    """A protector in the foreground, and where it is spoken with."""

    def __init__(self, daemon: Protector, path: Path) -> None:
        self.daemon = daemon
        self.path = path
        self._lines: list[Line] = []

    def line(self, *, follows: bool = False) -> Line:
        """Connect; it is closed when the test ends."""
        eventually(self._there, "the control socket")
        made = Line(self.path)
        self._lines.append(made)
        if follows:
            made.ask("events")
        return made

    def _there(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def status(self) -> dict[str, Any]:
        with Line(self.path) as line:
            return line.status()

    def generation(self, number: int) -> dict[str, Any]:
        """What status says of one generation."""
        [found] = [each for each in self.status()["generations"] if each["number"] == number]
        assert isinstance(found, dict)
        return found

    def until(self, name: str, value: object) -> dict[str, Any]:
        """Wait until status says so, and return it."""
        eventually(lambda: bool(self.status()[name] == value), f"{name} {value}")
        return self.status()

    def until_generation(self, number: int, **values: object) -> dict[str, Any]:
        """Wait until status says so of a generation, and return what it says of it."""
        eventually(
            lambda: values.items() <= self.generation(number).items(),
            f"generation {number}: {values}",
        )
        return self.generation(number)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses of its TCP listeners at 127.0.0.1."""
        ports = [each["address"].rpartition(":")[2] for each in self.status()["listeners"]]
        return [("127.0.0.1", int(port)) for port in ports]

    @property
    def address(self) -> tuple[str, int]:
        """Of the first listener, also where the log is in a file."""
        port = self.status()["listeners"][0]["address"].rpartition(":")[2]
        return "127.0.0.1", int(port)

    def pids(self, number: int) -> list[int]:
        return [each["pid"] for each in self.generation(number)["workers"]]

    def end(self) -> None:
        for each in self._lines:
            each.close()


#: Starts a protector that is spoken with: operated(*options, command=...).
Operating = Callable[..., Operated]


def say_watchdog(pid: int) -> None:
    """Say WATCHDOG=1 for a worker: from here on it must do so itself."""
    address = environment_of(pid)["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"WATCHDOG=1", address.replace("@", "\0", 1))


def nothing_of(line: Line, names: Sequence[str], seconds: float) -> None:
    """See that none of these events comes for so long."""
    pass_time(seconds)
    line.status()
    assert not [each for each in line.kept if each["event"] in names]


def pass_time(seconds: float) -> None:
    """Let a time go by in which something would happen that must not."""
    select.select([], [], [], seconds)
