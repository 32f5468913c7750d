"""Listeners, channels and descriptors in memory: each connection is in one place, and no process.

A descriptor is a number that names a connection.  Closing one twice, or leaving one open, is found.
"""

from __future__ import annotations

import errno
import os
import struct
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery.queue import (
    acceptor,
    listener_drain,
    outlet,
    probe_sender,
    queue_watch,
    shortage,
    undelivered,
)
from socketprotector.daemon.runtime import Runtime
from socketprotector.model.settings import ListenerSettings
from socketprotector.system.loop import WRITE
from tests.unit.daemon.clock import Clock

_INT = struct.Struct("i")


def header(listener: int, time: int = 1) -> bytes:
    """The record of a client that came by a listener; time 0: of a probe."""
    return wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, listener, 0, time)


PROBE = header(0, 0)


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Kernel:
    """The descriptors of this process."""

    def __init__(self) -> None:
        self.open: dict[int, str] = {}  # descriptor -> the connection
        self.most = 1000  # how many descriptors there can be
        self._last = 100

    @property
    def is_full(self) -> bool:
        return len(self.open) >= self.most

    def new(self, connection: str) -> int:
        if self.is_full:
            raise failure(errno.EMFILE)
        self._last += 1
        self.open[self._last] = connection
        return self._last

    def close(self, fd: int) -> None:
        del self.open[fd]

    @property
    def connections(self) -> list[str]:
        return [each for each in self.open.values() if each != "reserve"]

    def use_in(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        calls = SimpleNamespace(
            **{name: getattr(os, name) for name in ("strerror", "devnull", "O_RDONLY", "O_CLOEXEC")}
        )
        calls.open, calls.close = lambda *_: self.new("reserve"), self.close
        for each in modules:
            if hasattr(each, "os"):
                patch.setattr(each, "os", calls)


class MemoryListener:
    """A listening socket with a backlog."""

    def __init__(
        self, kernel: Kernel, index: int, *, foreign: bool = False, can_refuse: bool = True
    ) -> None:
        self._kernel, self.index, self.number = kernel, index, 10 + index
        self.settings = ListenerSettings(f"tcp:127.0.0.1:{8000 + index}", foreign=foreign)
        self.backlog: list[str] = []
        self.fails: list[int] = []  # the errors of the next accepts
        self.lost = self.always_readable = self.hangs_up = False
        self.alive = True
        self.refuses = self.closed = False
        self.survives = False
        self._can_refuse = can_refuse
        self.socket = SimpleNamespace(_accept=self._accept, family=2)

    def _accept(self) -> tuple[int, None]:
        assert not self.closed
        if self.fails:
            raise failure(self.fails.pop(0))
        if not self.alive:
            raise failure(errno.EINVAL)
        if not self.backlog:
            raise BlockingIOError(errno.EAGAIN, "no client")
        made = self._kernel.new(self.backlog[0])
        del self.backlog[0]
        return made, None

    def fileno(self) -> int:
        return self.number

    def is_alive(self) -> bool:
        return self.alive

    def has_waiting(self) -> bool:
        return bool(self.backlog)

    def refuse_new(self) -> bool:
        self.refuses = True
        return self._can_refuse

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def leave(self, socket_number: int) -> str:
        self.close()
        return f"listener{self.index}" if self.survives else ""

    def descriptors(self) -> dict[str, int]:
        return {f"listener{self.index}": self.fileno()}


class MemoryChannel:
    """A generation's queue: records, and the connections that they carry."""

    def __init__(self, kernel: Kernel, number: int, *knows: int, room: int = 1000) -> None:
        self._kernel = kernel
        self.generation = SimpleNamespace(record=SimpleNamespace(number=number))
        self.known: frozenset[int] | None = frozenset(knows) if knows else None
        self.line: list[tuple[bytes, str]] = []
        self.room = room
        self.fails: list[int] = []  # the errors of the next sends
        self.take_fails: list[int] = []
        self.shut = self.has_ended = self.closed = False
        self.taken_from = self.untaken_reported = False
        self.met = self.sent = 0
        self.number = 1000 + number
        self.write = SimpleNamespace(
            fileno=lambda: -1 if self.has_ended else self.number, sendmsg=self._sendmsg
        )

    def knows_of(self, index: int) -> bool:
        return self.known is None or index in self.known

    def _sendmsg(
        self, buffers: list[bytes], rights: list[tuple[int, int, bytes]], _flags: int
    ) -> None:
        if self.fails:
            raise failure(self.fails.pop(0))
        if self.shut or self.has_ended:
            raise failure(errno.EPIPE)
        if len(self.line) >= self.room:
            raise BlockingIOError(errno.EAGAIN, "full")
        [(_, _, packed)] = rights
        self.line.append((b"".join(buffers), self._kernel.open[_INT.unpack(packed)[0]]))

    def send(self, record: bytes, fd: int) -> None:
        self._sendmsg([record], [(0, 0, _INT.pack(fd))], 0)

    def has_room(self) -> bool:
        return len(self.line) < self.room

    def capacity(self) -> int:
        return self.room

    def depth(self) -> int:
        assert not self.closed
        return len(self.line)

    def peek(self) -> bytes | None:
        assert not self.closed
        if self.take_fails:
            raise failure(self.take_fails.pop(0))
        return self.line[0][0] if self.line else None

    def take_back(self) -> tuple[bytes, int] | None:
        assert not self.closed
        if self.take_fails:
            raise failure(self.take_fails.pop(0))
        if not self.line:
            return None
        record, connection = self.line.pop(0)
        return record, -1 if self._kernel.is_full else self._kernel.new(connection)

    def is_shut(self) -> bool:
        return self.shut and not self.has_ended

    def end(self) -> None:
        self.has_ended = True

    def close(self) -> None:
        assert not self.closed
        self.closed = self.has_ended = True

    def hold(self, *connections: str, listener: int = 0) -> None:
        """Fill it, as an earlier program did."""
        self.line += [(header(listener), each) for each in connections]

    @property
    def names(self) -> list[str]:
        return [connection for _, connection in self.line]


class QueueWorld:
    """The kernel and the loop around one part of the delivery."""

    def __init__(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.kernel = Kernel()
        self.clock = Clock()
        self.writable = True  # the state can be written
        self.listeners: list[MemoryListener] = []
        parts = (acceptor, listener_drain, outlet, probe_sender, queue_watch, shortage, undelivered)
        self.kernel.use_in(patch, *parts, *modules)
        timed = [each for each in (*parts, *modules) if hasattr(each, "time")]
        runtime = self.clock.use_in(patch, *timed)

        def persist() -> bool:
            return runtime.persist() and self.writable

        self.runtime = Runtime(runtime.loop, runtime.log, runtime.post, persist)

    def listener(self, index: int, **how: Any) -> MemoryListener:
        made = MemoryListener(self.kernel, index, **how)
        self.listeners.append(made)
        return made

    def channel(self, number: int, *knows: int, room: int = 1000) -> MemoryChannel:
        return MemoryChannel(self.kernel, number, *knows, room=room)

    def turn(self, *channels: MemoryChannel) -> None:
        """Call back, once each, for what is readable or has room."""
        readable = {
            each.fileno()
            for each in self.listeners
            if not each.closed and (each.backlog or each.fails or not each.alive)
        }
        has_room = {each.number for each in channels if each.has_room()}
        for fd, ready in [*self.clock.watched.items()]:
            if self.clock.watched.get(fd) is not ready:
                continue  # an earlier callback has unwatched it
            if fd in (has_room if self.clock.watched_for[fd] == WRITE else readable):
                ready()


def any_of(made: object) -> Any:
    """Pass a stand-in where the real class is expected."""
    return cast("Any", made)


def drain(channel: MemoryChannel, count: int | None = None) -> list[str]:
    """Take connections as workers do; return them, the oldest first."""
    taken = channel.names[:count]
    del channel.line[:count]
    return taken
