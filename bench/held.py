"""The worker of the soak: it leaves on record which connections it holds, whatever ends it.

A file of one byte for each port of a client, mapped into memory: 1 from when a connection
was taken until it is closed.  It outlives a SIGKILL, so it shows exactly which connections
the kill has cost.  One at most is missing: taken, and not noted yet.

It leaves without haste when its RETURN line ends, and at SIGTERM.

    python -m bench.held FOLDER     (the file is FOLDER/PID)
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
from pathlib import Path

from socketprotector_client import wire
from socketprotector_client.sd_notify import notify

from bench.worker import Take, Worker

PORTS = 65536


class NotingWorker(Worker):
    """Serves as the worker that is measured does, and notes which clients."""

    def __init__(self, table: Path) -> None:
        """Make the file."""
        super().__init__("library")
        fd = os.open(table, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, PORTS)
        self._held = mmap.mmap(fd, PORTS)
        os.close(fd)
        self._ports: dict[int, int] = {}  # descriptor -> the client's port
        self._take = self._noting(self._take)
        self._return = int(os.environ[wire.ENV_RETURN])
        self._asked = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(self) -> None:
        """Serve until told to leave and the last connection is closed."""
        signal.signal(signal.SIGTERM, lambda *_: os.eventfd_write(self._asked, 1))
        leave = {self._return, self._asked}
        for fd in leave:
            self._poll.register(fd, select.EPOLLIN)
        notify("READY=1", wire.RETIRES_ON_RETURN)
        while not self._draining or self._kept:
            for fd, _ in self._poll.poll():
                if fd in leave:
                    self._leave(leave)
                elif fd != self._source:
                    self._answer(self._kept[fd])
                elif not self._draining:
                    self._take_some()

    def _leave(self, told_by: set[int]) -> None:
        """Take no more.  Nothing is ever said on these, so any event means it."""
        for fd in told_by:
            self._poll.unregister(fd)
        if not self._draining:
            self._draining = True
            self._poll.unregister(self._source)

    def _noting(self, take: Take) -> Take:
        def noted() -> tuple[socket.socket, int] | None:
            taken = take()
            if taken is not None:
                try:  # a question of the protector's, accepted at 0, may come from a client's port
                    port = taken[0].getpeername()[1] if taken[1] else 0
                except OSError:
                    port = 0  # reset already: no client can miss it
                self._held[port] = 1
                self._ports[taken[0].fileno()] = port
            return taken

        return noted

    def _answer(self, connection: socket.socket) -> None:
        fd = connection.fileno()
        super()._answer(connection)
        if connection.fileno() < 0:
            self._held[self._ports.pop(fd)] = 0


def held_ports(table: Path) -> frozenset[int]:
    """Return the ports of the clients that a worker held when it ended."""
    try:
        noted = table.read_bytes()
    except FileNotFoundError:
        return frozenset()  # it was killed before it could take any
    return frozenset(port for port, held in enumerate(noted) if held and port)


if __name__ == "__main__":
    file = Path(sys.argv[1]) / str(os.getpid())
    NotingWorker(file).run()
    file.unlink()
