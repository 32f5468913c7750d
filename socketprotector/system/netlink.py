"""Queries over netlink sockets.

Source: netlink(7); linux/netlink.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    #: The fixed fields of a reply about one socket or route, and its attributes.
    Reply = tuple[tuple[Any, ...], bytes]

#: The netlink families.
ROUTES, SOCK_DIAG = 0, 4
#: Kinds of requests: about routes; about sockets, by family.
GET_ROUTE, BY_FAMILY = 26, 20
_DONE, _ERROR = 3, 2
_REQUEST, _REQUEST_AND_DUMP = 0x001, 0x301
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # length, type
_ANSWER_BYTES = 65_536


def query(
    request: bytes,
    form: struct.Struct,
    *,
    dump: bool,
    kind: int = BY_FAMILY,
    netlink_family: int = SOCK_DIAG,
) -> Iterator[Reply]:
    """Send a request, and yield each reply: about a socket, or about a route.

    dump: the kernel sends many replies and an end marker.  Raises OSError, also for a refusal.
    """
    with connect(netlink_family) as netlink:
        yield from replies(netlink, request, form, dump=dump, kind=kind)


def connect(family: int = SOCK_DIAG) -> socket.socket:
    """Return a netlink socket, for replies().  Raises OSError."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)


def replies(
    netlink: socket.socket,
    request: bytes,
    form: struct.Struct,
    *,
    dump: bool,
    kind: int = BY_FAMILY,
) -> Iterator[Reply]:
    """Send a request by a socket, and yield each reply, see query()."""
    flags = _REQUEST_AND_DUMP if dump else _REQUEST
    # The kernel replies during send(): nothing here ever waits.
    netlink.send(
        _HEADER.pack(_HEADER.size + len(request), kind, flags, 1, 0) + request, socket.MSG_DONTWAIT
    )
    while data := netlink.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT):
        at = 0
        while at + _HEADER.size <= len(data):
            length, found, *_ = _HEADER.unpack_from(data, at)
            body = at + _HEADER.size
            if found == _ERROR:
                number = -struct.unpack_from("=i", data, body)[0]
                raise OSError(number, "the kernel does not report that")
            if found == _DONE or length < _HEADER.size:
                return
            yield form.unpack_from(data, body), data[body + form.size : at + length]
            at += (length + 3) & ~3
        if not dump:
            return


def attribute(attributes: bytes, wanted: int) -> bytes:
    """Return the content of an attribute, empty if it is missing."""
    at = 0
    while at + ATTRIBUTE.size <= len(attributes):
        length, kind = ATTRIBUTE.unpack_from(attributes, at)
        if length < ATTRIBUTE.size:
            break
        if kind == wanted:
            return attributes[at + ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return b""
