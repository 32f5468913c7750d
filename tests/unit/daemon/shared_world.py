"""Listening sockets that workers share, in memory: who waits where, and what was ordered.

A socket has a line of clients, by their ends as sock_diag reports them, and options.  The tests
replace the functions that ask the kernel by functions of MemoryKernel.
"""

from __future__ import annotations

import errno
import os
import socket
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from socketprotector.daemon.delivery.shared.shared_listeners import SharedListeners, Steering
from socketprotector.daemon.delivery.shared.turns import Turns
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import socket_file
from tests.unit.daemon.clock import Clock


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def end(host: str, port: int = 5000) -> bytes:
    """A TCP client as sock_diag reports it: its port and address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return port.to_bytes(2, "big") + socket.inet_pton(family, host).ljust(16, b"\0")


class MemorySocket:
    """One listening socket."""

    _last = 10

    def __init__(self, family: int = socket.AF_INET) -> None:
        MemorySocket._last += 1
        self._fd = MemorySocket._last
        self.family = family
        self.line: list[Any] = []  # the ends of the clients that wait, the oldest first
        self.listens = self.sound = True
        self.tag = 0
        self.options: dict[str, bytes] = {}
        self.stays: tuple[str, ...] = ()  # the options that cannot be set again
        self.is_locked = self.device_is_gone = self.is_unreachable = False

    def fileno(self) -> int:
        return self._fd

    def getsockopt(self, *_: int) -> int:
        return self.listens


class MemoryListener:
    """An address with its sockets."""

    def __init__(
        self, index: int = 0, *, count: int = 2, path: str = "", foreign: bool = False
    ) -> None:
        self.index, self.path = index, path
        address = f"unix:{path}" if path else f"tcp:127.0.0.1:{8000 + index}"
        self.settings = ListenerSettings(address, foreign=foreign, name=f"name{index}")
        self._family = socket.AF_UNIX if path else socket.AF_INET
        self.local_address = (path, 0) if path else ("127.0.0.1", 8000 + index)
        self.sockets = [self.made() for _ in range(count)]
        self.shared, self.lost = True, False
        self.is_fresh = [False, False]
        self.can_listen_again = self.can_be_held = True
        self.bind_fails = self.reserve_fails = self.renew_fails = 0
        self.reserved: MemorySocket | None = None
        self.is_reserved_for_clients = self.has_held_client = self.is_cut_off = False
        self.path_fault = ""
        self.lacks_interface = False
        self.file_rights: socket_file.Rights | None = socket_file.Rights(-1, -1, 0o600)
        self.passed_by: set[int] = set()
        self.identities = [(1, 1), (1, 2)]
        self.renewed: list[int] = []
        self.renews = False
        self.let_in_count = self.noted = 0
        self.spare = self.has_no_spare = False

    def made(self) -> MemorySocket:
        return MemorySocket(self._family)

    @property
    def socket(self) -> MemorySocket:
        return self.sockets[0]

    @property
    def has_sibling(self) -> bool:
        return len(self.sockets) == 2

    def socket_for(self, number: int) -> MemorySocket:
        return self.sockets[number % len(self.sockets)]

    def ensure_address(self, number: int) -> tuple[str, int]:
        return (f"{self.path}.{number}", 0) if self.path else ("127.0.0.1", 8000 + self.index)

    def identity(self, number: int) -> tuple[int, int]:
        if self.socket_for(number).is_unreachable:
            raise failure(errno.ESTALE)
        return self.identities[number]

    def is_alive(self, number: int) -> bool:
        return self.socket_for(number).listens

    def is_sound(self, number: int) -> bool:
        return self.socket_for(number).sound

    def has_waiting(self, number: int | None = None) -> bool:
        polled = self.sockets if number is None else [self.socket_for(number)]
        return any(each.line for each in polled)

    def listen_again(self, number: int) -> bool:
        self.socket_for(number).listens |= self.can_listen_again
        return self.can_listen_again

    def bind_anew(self, number: int) -> None:
        if self.bind_fails:
            raise failure(self.bind_fails)
        self.sockets[number % len(self.sockets)] = self.made()

    def drop_socket(self, number: int) -> None:
        del self.sockets[number % 2]

    def adopt_reserved(self, number: int) -> None:
        if self.reserve_fails:
            raise failure(self.reserve_fails)
        assert self.reserved is not None
        if self.has_sibling:
            self.sockets[number] = self.reserved
        else:
            self.sockets.insert(number, self.reserved)
        self.reserved, self.is_reserved_for_clients = None, False

    def reserve(self) -> MemorySocket:
        if self.reserve_fails:
            raise failure(self.reserve_fails)
        self.reserved = self.reserved or self.made()
        return self.reserved

    def renew(self, number: int) -> bool:
        if self.renew_fails:
            raise failure(self.renew_fails)
        self.renewed.append(number)
        return self.renews

    def is_out_of_reach(self, number: int) -> bool:
        return self.socket_for(number).is_unreachable

    def is_passed_by(self, number: int) -> bool:
        return number in self.passed_by

    def can_do_without(self, one: MemorySocket) -> bool:
        return self.spare

    def let_in(self) -> None:
        self.let_in_count += 1

    def note(self) -> None:
        self.noted += 1


class MemoryKernel:
    """What the kernel answers about the sockets of these listeners."""

    def __init__(self, listeners: list[MemoryListener]) -> None:
        self._listeners = listeners
        self.diag_fails = self.queue_fails = self.discard_fails = 0
        self.other_namespace = False  # its clients are not listed
        self.found: dict[MemorySocket, Any] = {}

    def queue(self, listening: MemorySocket) -> tuple[int, int]:
        if self.queue_fails:
            raise failure(self.queue_fails)
        return len(listening.line), 128

    def unaccepted(self, listening: MemorySocket) -> Any:
        if self.diag_fails:
            raise failure(self.diag_fails)
        if self.other_namespace:
            return frozenset()
        if listening.family == socket.AF_UNIX:
            return tuple(listening.line)
        [address] = [each for each in self._listeners if listening in each.sockets]
        return frozenset(end for each in address.sockets for end in each.line)

    def discard_waiting(self, listening: MemorySocket, count: int) -> None:
        if self.discard_fails:
            raise failure(self.discard_fails)
        assert count <= len(listening.line)
        del listening.line[:count]


class MemorySteering(Steering):
    """Notes the orders of the parts."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.succeeds = True
        self.on_replace: Any = lambda *_: None

    def steer(self) -> bool:
        self.calls.append(("steer",))
        return self.succeeds

    def repair(self, listener: Any, socket_number: int) -> None:
        self.calls.append(("repair", listener, socket_number))
        listener.listen_again(socket_number)

    def replace(self, listener: Any, socket_number: int) -> None:
        self.calls.append(("replace", listener, socket_number))
        self.on_replace(listener, socket_number)

    def adopt_held(self) -> None:
        self.calls.append(("adopt_held",))

    def gets_no_client(self, generation: int) -> bool:
        return False


class Host:
    """The resident process, and what was reported to it."""

    def __init__(self, world: SharedWorld) -> None:
        self.runtime = world.runtime
        self.generations: dict[int, Any] = {}
        self.lost: list[tuple[Any, str]] = []
        self.bound: list[Any] = []
        self.untaken: list[tuple[Any, ...]] = []
        self.own_connection = None

    def listener_lost(self, listener: Any, reason: str) -> None:
        self.lost.append((listener, reason))

    def listener_bound(self, listener: Any) -> None:
        self.bound.append(listener)

    def report_untaken(self, *what: Any) -> None:
        self.untaken.append(what)


class SharedWorld:
    """Listeners, their assignment to generations, and the parts around one module."""

    def __init__(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.clock = Clock()
        timed = [each for each in modules if hasattr(each, "time")]
        self.runtime = self.clock.use_in(patch, *timed)
        self.all: list[MemoryListener] = []
        self.kernel = MemoryKernel(self.all)
        self.host = Host(self)
        listeners: Any = self.all
        host: Any = self.host
        self.listeners = SharedListeners(host, listeners)
        self.listeners.all = listeners
        self.turns = Turns()
        self.steering = MemorySteering()
        for each in modules:
            if hasattr(each, "reuseport"):
                calls = SimpleNamespace(
                    queue=self.kernel.queue, discard_waiting=self.kernel.discard_waiting
                )
                patch.setattr(each, "reuseport", calls)
            if hasattr(each, "unaccepted"):
                patch.setattr(each, "unaccepted", self.kernel.unaccepted)

    def listener(self, **how: Any) -> MemoryListener:
        self.all.append(MemoryListener(len(self.all), **how))
        return self.all[-1]

    def serving(self, *generations: int) -> None:
        """Each of them gets its socket and the new clients in turn; the last one serves."""
        for each in generations:
            self.turns.accepting[each] = number = self.turns.free
            self.turns.turn_to(number, {each.index for each in self.all}, lambda _: True)

    def starting(self, generation: int) -> None:
        self.turns.accepting[generation] = self.turns.free
