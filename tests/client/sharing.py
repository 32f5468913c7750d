"""A program with a SocketServer, seen from outside: where it listens, and its processes."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from socketprotector_client.address import family_of, sockname_of
from socketprotector_client.connection import Connection
from socketprotector_client.drain_state import Drain
from socketprotector_client.intake import Intake
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.source import ListenSource

from tests.channel import Channel, Worker
from tests.procfs import children_of, command_line_of, descriptors, running, state_of
from tests.running import DEADLINE_S, Client, eventually

HOME = "127.0.0.1:0"


class Sharing:
    """The program, its children and its accepting process."""

    def __init__(
        self,
        channel: Channel,
        *words: str,
        alone: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        self._channel = channel
        self.program: Worker = channel.spawn("shares.py", *words, alone=alone, env=env)
        self.listeners = self.program.read_line().split()
        if words[0] == "run":
            channel.wait_ready(self.program)  # from then on it takes signals
        self._pidfds: dict[int, int] = {}

    def connect(self, number: int = 0) -> Client:
        name = self.listeners[number]
        return self._channel.client(sockname_of(name))

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.program.pid, number)

    def processes(self) -> list[int]:
        """Its accepting process and its children."""
        return children_of(self.program.pid)

    def accepting(self) -> int:
        (pid,) = running("accepting", self.processes())
        return pid

    def children(self) -> list[int]:
        return [pid for pid in self.processes() if "accepting" not in command_line_of(pid)]

    def watch(self) -> None:
        """Remember the processes that live now, for `wait_for_all`."""
        for pid in self.processes():
            self._pidfds[pid] = os.pidfd_open(pid)

    def wait_for_all(self) -> None:
        """Wait until all that `watch` has seen have ended."""
        while self._pidfds:
            _, pidfd = self._pidfds.popitem()
            try:
                assert select.select([pidfd], [], [], DEADLINE_S)[0], "it lives on"
            finally:
                os.close(pidfd)


def let_open(pid: int, count: int) -> int:
    """Let a process have no descriptor from count on; return what the limit was."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, hard))
    return soft


def lowest_free(pid: int) -> int:
    """The number that the next file of a process would get."""
    taken = descriptors(pid)
    return next(number for number in range(len(taken) + 1) if number not in taken)


def refuses(name: str) -> bool:
    family = family_of(name)
    assert family is not None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(sockname_of(name))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
    return False


def until_stopped(pid: int) -> None:
    eventually(lambda: state_of(pid) == "T", "a stopped process")


def taken(intake: Intake) -> Connection:
    """Connect to an intake that accepts, and return the connection that it takes."""
    with socket.create_connection(intake.source.sockname):
        connection = intake.get(10)
    assert connection is not None
    return connection


def in_child(act: Callable[[], bool]) -> None:
    """Fork, and check what act returns there."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(not act())
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextmanager
def serving(source: ListenSource, limit: int = 8) -> Iterator[Intake]:
    intake = Intake(source, Drain(()), limit, {}, Scoreboard(-1, 0))
    try:
        yield intake
    finally:
        intake.close()


def connect(intake: Intake, listener: int = 0) -> socket.socket:
    assert isinstance(intake.source, ListenSource)
    return socket.create_connection(intake.source.listeners[listener].getsockname())
