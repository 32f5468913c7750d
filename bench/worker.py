"""The worker that is measured: one process, one epoll loop, one answer a connection.

    worker.py channel   takes from the channel of design section 2 with recvmsg itself
    worker.py library   the same through the client library
    worker.py counted   by the library's Listener, which also counts; `uncounted`: it does not
    worker.py direct    accepts on the listener whose number is in BENCH_LISTENER

Apart from `take` all three run the same lines, so that what differs between two figures
is the handing over.  Lines it knows: `ping` (echo and close), `hold` (echo, stay open,
echo every further line), `stamps` (say when what happened, in JSON, and close).
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

IDLE = 1  # takes per wake-up while idle: the one that finds nothing costs 4 us
BUSY = 16
SAMPLES = 20_000  # queue waits kept, the newest; see `stamps`

#: Returns a connection and the time of its accept (0 if unknown), None when there is none now;
#: raises EOFError when no more will come.
Take = Callable[[], tuple[socket.socket, int] | None]


def from_listener() -> tuple[int, Take]:
    """Return what to watch and what takes the next connection, accepting it itself."""
    listener = socket.socket(fileno=int(os.environ["BENCH_LISTENER"]))
    listener.setblocking(False)

    def take() -> tuple[socket.socket, int] | None:
        try:
            return listener.accept()[0], 0
        except BlockingIOError:
            return None

    return listener.fileno(), take


def from_channel() -> tuple[int, Take]:
    """The same from the channel, by recvmsg alone."""
    channel = socket.socket(fileno=int(os.environ["SOCKETPROTECTOR_CHANNEL"]))
    room = socket.CMSG_LEN(4)
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    header = struct.Struct("<BBHIQ")
    number = struct.Struct("i")

    def take() -> tuple[socket.socket, int] | None:
        try:
            record, rights, _, _ = channel.recvmsg(16, room, flags)
        except BlockingIOError:
            return None
        if not record:
            raise EOFError
        (fd,) = number.unpack(rights[0][2])
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
        return connection, header.unpack(record)[4]

    return channel.fileno(), take


def from_library() -> tuple[int, Take]:
    """The same from the channel, by the client library."""
    from socketprotector_client.channel import Channel
    from socketprotector_client.errors import Drained

    channel = Channel.from_environment()
    if channel is None:
        raise SystemExit("library: there is no protector")
    families = channel.families
    take_one = channel.take

    def take() -> tuple[socket.socket, int] | None:
        try:
            taken = take_one()
        except Drained:
            raise EOFError from None
        if taken is None:
            return None
        fd, listener, accepted_ns = taken
        family = families[listener] or socket.AF_INET
        return socket.socket(family, socket.SOCK_STREAM, 0, fileno=fd), accepted_ns

    return channel.fileno(), take


def from_counted() -> tuple[int, Take]:
    """The same by the library's drop-in for a listening socket, as most programs use it."""
    from socketprotector_client import Listener

    listener = Listener(take=None)
    listener.setblocking(False)

    def take() -> tuple[socket.socket, int] | None:
        try:
            connection = listener.accept()[0]
        except BlockingIOError:
            return None
        return connection, connection.accepted_at_ns

    return listener.fileno(), take


def from_uncounted() -> tuple[int, Take]:
    """The same without a scoreboard."""
    os.environ.pop("SOCKETPROTECTOR_SCOREBOARD", None)
    return from_counted()


SOURCES = {
    "direct": from_listener,
    "channel": from_channel,
    "library": from_library,
    "counted": from_counted,
    "uncounted": from_uncounted,
}


def say_ready(also: bytes = b"") -> None:
    """Tell the protector, if there is one, that connections may come; also: further lines."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1" + also, "\0" + address[1:] if address[0] == "@" else address)


class Worker:
    """Owns the descriptor it takes from and every connection taken."""

    def __init__(self, mode: str) -> None:
        self._source, self._take = SOURCES[mode]()
        self._poll = select.epoll()
        self._poll.register(self._source, select.EPOLLIN)
        self._kept: dict[int, socket.socket] = {}
        self._budget = IDLE
        self._draining = False
        self._prefix = b"[%d] " % os.getpid()
        self._waits: list[int] = [0] * SAMPLES
        self._taken = 0
        self._stamps = {
            "generation": int(
                os.environ.get("SOCKETPROTECTOR_GENERATION")
                or os.environ.get("SERVER_STARTER_GENERATION", "0")
            ),
            "execed_ns": int(os.environ.get("BENCH_EXECED_NS", 0)),
        }

    def run(self) -> None:
        """Serve until the channel has ended and the last connection is closed."""
        self._stamps["ready_ns"] = time.monotonic_ns()
        say_ready()
        source = self._source
        while not self._draining or self._kept:
            for fd, _ in self._poll.poll():
                if fd == source:
                    self._take_some()
                else:
                    self._answer(self._kept[fd])

    def _take_some(self) -> None:
        for _ in range(self._budget):
            try:
                taken = self._take()
            except EOFError:
                self._draining = True
                self._poll.unregister(self._source)
                return
            if taken is None:
                self._budget = IDLE
                return
            connection, accepted_ns = taken
            if accepted_ns:
                self._waits[self._taken % SAMPLES] = time.monotonic_ns() - accepted_ns
            if self._taken == 0:
                self._stamps["first_ns"] = time.monotonic_ns()
            self._taken += 1
            self._answer(connection)
        self._budget = min(BUSY, self._budget * 2)

    def _answer(self, connection: socket.socket) -> None:
        fd = connection.fileno()
        try:
            line = connection.recv(512, socket.MSG_DONTWAIT)
            if line == b"ping\n":
                connection.send(self._prefix + line)
            elif line == b"stamps\n":
                connection.send(self._prefix + self._told())
            elif line:
                connection.send(self._prefix + line)
                self._keep(fd, connection)
                return
        except BlockingIOError:
            self._keep(fd, connection)
            return
        except ConnectionError:
            pass  # the client is gone; nothing is owed to it
        if self._kept.pop(fd, None) is not None:
            # Before the close: the protector's copy may live a moment longer than ours, and
            # events would go on coming for a number that is no longer there.
            self._poll.unregister(fd)
        connection.close()

    def _keep(self, fd: int, connection: socket.socket) -> None:
        if fd not in self._kept:
            self._kept[fd] = connection
            self._poll.register(fd, select.EPOLLIN)

    def _told(self) -> bytes:
        waits = sorted(self._waits[: self._taken])
        told = dict(self._stamps, taken=self._taken, kept=len(self._kept))
        told["wait_p50_ns"] = waits[len(waits) // 2] if waits else 0
        return json.dumps(told).encode() + b"\n"


if __name__ == "__main__":
    Worker(sys.argv[1]).run()
