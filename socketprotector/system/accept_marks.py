"""Marks on listening sockets that what they accept inherits, and how many there are of each.

The kernel does not tell which process has a connection, nor which socket has accepted it.  But it
copies a listening socket's options to what it accepts, and tells some of them (sock_diag).  A mark
is in options that mean nothing to TCP: where multicast goes, when connect() chooses a port.

Source: ip(7); struct inet_diag_sockopt in linux/inet_diag.h (since Linux 5.10).
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import permutations

from .sock_diag import accepted, end_of

IP_BIND_ADDRESS_NO_PORT = 24
IP_MULTICAST_ALL = 49
#: Option and its bit in the two bytes that are told; compilers fill bit-fields from the other end
#: where bytes are in the other order.
_BITS = (
    (socket.IP_MULTICAST_LOOP, 0x0010 if sys.byteorder == "little" else 0x0008),
    (IP_BIND_ADDRESS_NO_PORT, 0x0100 if sys.byteorder == "little" else 0x8000),
    (IP_MULTICAST_ALL, 0x0040 if sys.byteorder == "little" else 0x0002),
)
#: How many there are, counted from 1; 0 is none.
MARKS = (1 << len(_BITS)) - 1


def mark(
    listening: socket.socket, number: int, but: Collection[int] = frozenset()
) -> frozenset[int]:
    """Have what a socket accepts from now on be of this mark.  Raises OSError.

    One option is set after the other, and a client may come in between.  Returns the marks that
    it had until then: in between none of `but`, if there is an order in which that can be.
    """
    unmarked, before = _unmarked(listening.family), mark_of(listening)
    changed = [place for place in range(len(_BITS)) if (before ^ number) >> place & 1]

    def had(order: Sequence[int]) -> frozenset[int]:
        steps = range(len(order))
        return frozenset(before ^ sum(1 << place for place in order[:step]) for step in steps)

    order = min(permutations(changed), key=lambda order: len(had(order).intersection(but)))
    for place in order:
        value = (number ^ unmarked) >> place & 1
        listening.setsockopt(socket.IPPROTO_IP, _BITS[place][0], value)
    return had(order)


def mark_of(listening: socket.socket) -> int:
    """Return the mark of a socket, 0 for none.  Raises OSError."""
    found = sum(
        listening.getsockopt(socket.IPPROTO_IP, option) << place
        for place, (option, _) in enumerate(_BITS)
    )
    return found ^ _unmarked(listening.family)


def connections(
    listening: socket.socket, but: socket.socket | None = None, *, waiting: bool = False
) -> Counter[int]:
    """Return how many accepted connections at a socket's address processes have open, by mark.

    but: a client that does not count.  waiting: also clients that wait to be accepted.  Raises
    OSError where the kernel does not tell.
    """
    unmarked = _unmarked(listening.family)
    counted: Counter[int] = Counter()
    its = end_of(but, listening.family) if but is not None else b""
    for options, count in accepted(listening, its, waiting=waiting).items():
        told = int.from_bytes(options, "little")
        found = sum(bool(told & bit) << place for place, (_, bit) in enumerate(_BITS))
        counted[found ^ unmarked] += count
    return counted


def _unmarked(family: int) -> int:
    """Return what the options of a socket are that no process has changed."""
    return 0b001 if family == socket.AF_INET6 else 0b101
