"""A daemon that was built for the original, and a channel for its worker."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import pytest

from tests.c.building import SANITIZED, compiled, shared_folder
from tests.channel import Channel, Worker

#: What turns a command into one that the protector can start.
ADAPTER = (sys.executable, "-I", "-m", "socketprotector.programs.legacy.adapter", "--")
SUN_PATH_BYTES = 108


def padded(port: int) -> bytes:
    """The address as the original gives it: the structure's whole length."""
    return (b"\0sock_srv_%d" % port).ljust(SUN_PATH_BYTES, b"\0")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon's program."""
    return compiled(shared_folder(tmp_path_factory), "original", *SANITIZED)


@pytest.fixture
def channel(marked_environment: dict[str, str], channel: Channel) -> Channel:
    """The one of all tests, whose workers have ended when what is left is looked for."""
    return channel


class Legacy:
    """Starts the adapter on a channel, with the original's daemon as its child."""

    def __init__(self, channel: Channel, program: Path, environment: dict[str, str]) -> None:
        self.channel = channel
        self.program = program
        self.environment = environment

    @property
    def port(self) -> int:
        return int(self.channel.listeners[0].getsockname()[1])

    @property
    def log(self) -> str:
        return self.channel.log.read_text()

    def command(self, *words: str, ports: str = "") -> tuple[str, ...]:
        return (str(self.program), ports or str(self.port), *words)

    def spawn(
        self,
        *command: str,
        before: tuple[str, ...] = (),
        adapter: tuple[str, ...] = ADAPTER,
        **environment: str,
    ) -> Worker:
        """Start it as the protector does: in a session of its own, with nothing else open."""
        sets = [f"{name}={value}" for name, value in environment.items()]
        return self.channel.spawn(
            *("setsid", "env", *sets, *before, *adapter, *command), env=self.environment
        )

    def start(self, *words: str, **environment: str) -> Worker:
        """Start a daemon and wait until it is ready."""
        worker = self.spawn(*self.command(*words), before=(), adapter=ADAPTER, **environment)
        self.channel.wait_ready(worker)
        return worker


def pid_after(word: str, worker: Worker) -> int:
    """The number in the line of the daemon that begins with this word."""
    while True:
        line = worker.read_line()
        assert line, f"it never said {word}"
        if found := re.match(rf"{word} (\d+)", line):
            return int(found[1])


@pytest.fixture
def legacy(channel: Channel, original: Path, marked_environment: dict[str, str]) -> Legacy:
    return Legacy(channel, original, marked_environment)


def stranger(port: int) -> socket.socket:
    """A connection from a process that no worker has started."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.settimeout(30)
    one.connect(padded(port))
    return one


def patched(**constants: float) -> tuple[str, ...]:
    """The adapter with other deadlines."""
    sets = "; ".join(f"adapter.{name} = {value}" for name, value in constants.items())
    return (
        sys.executable,
        "-c",
        f"from socketprotector.programs.legacy import adapter; {sets}; adapter.main()",
        "--",
    )


def is_root() -> bool:
    return os.geteuid() == 0
