"""A program with a SocketServer, seen from outside: where it listens, and its processes."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
from pathlib import Path

from socketprotector_client.address import family_of, sockname_of

from tests.client.protector import DEADLINE_S, Client, Protector, Worker, until

HOME = "127.0.0.1:0"


class Sharing:
    """The program, its children and its accepting process."""

    def __init__(
        self,
        protector: Protector,
        *words: str,
        alone: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        self._protector = protector
        self.program: Worker = protector.spawn("shares.py", *words, alone=alone, env=env)
        self.listeners = self.program.read_line().split()
        if words[0] == "run":
            protector.wait_ready(self.program)  # from then on it takes signals
        self._pidfds: dict[int, int] = {}

    def connect(self, number: int = 0) -> Client:
        name = self.listeners[number]
        family = family_of(name)
        assert family is not None
        return self._protector.client(family, sockname_of(name))

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.program.pid, number)

    def processes(self) -> list[int]:
        """Its accepting process and its children."""
        path = Path(f"/proc/{self.program.pid}/task/{self.program.pid}/children")
        return [int(word) for word in path.read_text().split()]

    def accepting(self) -> int:
        (pid,) = (pid for pid in self.processes() if b"accepting" in self._command(pid))
        return pid

    def children(self) -> list[int]:
        return [pid for pid in self.processes() if b"accepting" not in self._command(pid)]

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

    @staticmethod
    def _command(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()


def let_open(pid: int, count: int) -> int:
    """Let a process have no descriptor from count on; return what the limit was."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, hard))
    return soft


def lowest_free(pid: int) -> int:
    """The number that the next file of a process would get."""
    taken = set(os.listdir(f"/proc/{pid}/fd"))
    return next(number for number in range(len(taken) + 1) if str(number) not in taken)


def reset(client: Client) -> None:
    """End a connection as a crash does."""
    linger_for_no_time = b"\1\0\0\0\0\0\0\0"
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_no_time)
    client.close()


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
    def is_stopped() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    until(is_stopped, "a stopped process")
