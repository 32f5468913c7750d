"""Handshakes that are under way: asked of the kernel, since a listening socket does not tell.

Only for this process's network namespace.

Source: sock_diag(7), netlink(7); linux/inet_diag.h.
"""

from __future__ import annotations

import socket
import struct

_SOCK_DIAG = 4  # the netlink family
_BY_FAMILY = 20
_DONE, _ERROR = 3, 2
_REQUEST_AND_DUMP = 0x301
_SYN_RECV = 1 << 3  # of the states, as a mask
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
#: Family, protocol, attributes, padding, states; then the socket: ports (in the network's order),
#: two addresses, interface, cookie.
_ASKED = struct.Struct("=BBBBI2s2s16s16sI8s")
#: Family, state, timer, retransmissions; then the socket: ports and addresses.
_TOLD = struct.Struct("=BBBB2s2s16s16s")
_NO_COOKIE = b"\xff" * 8
_ANSWER_BYTES = 65_536
#: The kernel answers while it is asked: nobody ever waits so long.
_ANSWER_S = 1.0


def half_open(family: int, port: int) -> frozenset[bytes]:
    """Return who is about to connect to a port: each one's own port and address.

    family: AF_INET, or AF_INET6 with IPv4 in it where the socket takes both.  Raises OSError
    where it cannot be asked.
    """
    nobody = bytes(16)
    asked = _ASKED.pack(
        *(family, socket.IPPROTO_TCP, 0, 0, _SYN_RECV),
        *(port.to_bytes(2, "big"), bytes(2), nobody, nobody, 0, _NO_COOKIE),
    )
    header = _HEADER.pack(_HEADER.size + len(asked), _BY_FAMILY, _REQUEST_AND_DUMP, 1, 0)
    found: set[bytes] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as ask:
        ask.settimeout(_ANSWER_S)
        ask.sendall(header + asked)
        while _take(ask.recv(_ANSWER_BYTES), found):
            pass
    return frozenset(found)


def _take(data: bytes, found: set[bytes]) -> bool:
    """Read one answer; False after the last.  Raises OSError for a refusal."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        body = at + _HEADER.size
        if kind == _ERROR:
            raise OSError(-struct.unpack_from("=i", data, body)[0], "the kernel does not tell")
        if kind == _DONE or length < _HEADER.size:
            return False
        *_, port, _, address = _TOLD.unpack_from(data, body)
        found.add(port + address)
        at += (length + 3) & ~3
    return bool(data)
