"""Open files of the simulated kernel, and the connections among them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.ports import Address


def failure(code: int, name: str | None = None) -> OSError:
    return OSError(code, os.strerror(code), name)


class File:
    """An open file: lives as long as a descriptor or a message refers to it."""

    def __init__(self) -> None:
        self.references = 0

    def ready(self) -> int:
        """The events that poll would report."""
        return 0

    def take(self) -> None:
        self.references += 1

    def drop(self) -> None:
        self.references -= 1
        if self.references == 0:
            self.closed()

    def closed(self) -> None:
        pass


class Question(File):
    """What the protector asks a generation by; no client's, so nobody has to take it."""

    def __init__(self, number: int, address: Address, tag: int) -> None:
        super().__init__()
        self.number = number  # below 0
        self.address = address
        self.tag = tag  # of the socket that it has come to
        self.taken = False
        self.excuse = ""  # why it may be taken for a client
        self.over = False  # closed: by who has taken it, or as its listening socket was shut down

    def closed(self) -> None:
        self.over = True

    def __repr__(self) -> str:
        return f"question {-self.number}"


class Connection(File):
    """One client's connection, and all that may be asked about it later."""

    def __init__(
        self, number: int, lost: Callable[[Connection], None], address: Address | None = None
    ) -> None:
        super().__init__()
        self.number = number
        self.taken_by: list[int] = []
        self.in_queues = 0
        self.source: Any = None  # where it was taken from: a listening socket, or a channel's end
        self.place = 0  # in the order of its source
        self.kept_back = False  # it could not be put back where it was taken from, and comes later
        self.excuse = ""  # why it may be lost
        self.established = False  # its handshake is over
        self.said = False  # the client has sent its words
        self.said_at = 0  # in turns of the protector's loop
        self.said_ns = 0
        self.heard = False  # and a server has read them
        self.late = False  # it was accepted by a worker that had been told to finish
        self.tag = 0  # of the socket that it has come to
        self.address = address  # where it is looked for by sock_diag
        self.came_by: Address | None = address
        self.added = address.added if address is not None else 0
        self._lost = lost
        if address is not None:
            address.clients[number] = self

    def closed(self) -> None:
        if self.address is not None:
            self.address.clients.pop(self.number, None)
        if not self.taken_by:
            self._lost(self)

    def __repr__(self) -> str:
        return f"connection {self.number}"
