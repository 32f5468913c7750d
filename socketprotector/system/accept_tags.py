"""Tags listening sockets; counts connections by the tag that they inherit from their socket.

The kernel does not report which socket accepted a connection.  But a connection inherits the
options of its listening socket, and sock_diag reports some of them.  A tag is encoded in options
that have no effect on TCP: multicast delivery, and when connect() chooses a port.

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
#: Each option, and its bit in the two bytes of the reply.  A big-endian machine fills bit-fields
#: from the other end.
_BITS = (
    (socket.IP_MULTICAST_LOOP, 0x0010 if sys.byteorder == "little" else 0x0008),
    (IP_BIND_ADDRESS_NO_PORT, 0x0100 if sys.byteorder == "little" else 0x8000),
    (IP_MULTICAST_ALL, 0x0040 if sys.byteorder == "little" else 0x0002),
)
#: The number of tags; they are counted from 1, and 0 means no tag.
TAGS = (1 << len(_BITS)) - 1


def tag(
    listening: socket.socket, number: int, exclude: Collection[int] = frozenset()
) -> frozenset[int]:
    """Tag the connections that a socket accepts from now on.  Raises OSError.

    The options are set one by one, and a client may connect in between.  Returns the tags that the
    socket had until the last option was set.  number: the new tag.  exclude: tags that the socket
    gets in between only if there is no other way.
    """
    untagged, before = _untagged(listening.family), tag_of(listening)
    changed = [place for place in range(len(_BITS)) if (before ^ number) >> place & 1]

    def had(order: Sequence[int]) -> frozenset[int]:
        steps = range(len(order))
        return frozenset(before ^ sum(1 << place for place in order[:step]) for step in steps)

    order = min(permutations(changed), key=lambda order: len(had(order).intersection(exclude)))
    for place in order:
        value = (number ^ untagged) >> place & 1
        listening.setsockopt(socket.IPPROTO_IP, _BITS[place][0], value)
    return had(order)


def tag_of(listening: socket.socket) -> int:
    """Return the tag of a socket; 0 if it has none.  Raises OSError."""
    found = sum(
        listening.getsockopt(socket.IPPROTO_IP, option) << place
        for place, (option, _) in enumerate(_BITS)
    )
    return found ^ _untagged(listening.family)


def connections(
    listening: socket.socket, exclude: socket.socket | None = None
) -> tuple[Counter[int], Counter[int]]:
    """Return the number of connections at a socket's address, by tag: open and waiting.

    exclude: the socket of a client that is not counted.  Raises OSError if the kernel does not
    report connections.
    """
    untagged = _untagged(listening.family)

    def by_tag(by_options: Counter[bytes]) -> Counter[int]:
        counted: Counter[int] = Counter()
        for options, count in by_options.items():
            bits = int.from_bytes(options, "little")
            found = sum(bool(bits & bit) << place for place, (_, bit) in enumerate(_BITS))
            counted[found ^ untagged] += count
        return counted

    excluded = end_of(exclude, listening.family) if exclude is not None else b""
    opened, waiting = accepted(listening, excluded)
    return by_tag(opened), by_tag(waiting)


def _untagged(family: int) -> int:
    """Return the initial values of the options, as bits."""
    return 0b001 if family == socket.AF_INET6 else 0b101
