"""Clients that no server has heard yet: asked of the kernel, for nobody else knows.

Their handshake is under way, or they have connected and said nothing, or nobody has read it.

Only for this process's network namespace.

Source: sock_diag(7), netlink(7); linux/inet_diag.h, linux/tcp.h.
"""

from __future__ import annotations

import socket
import struct

_SOCK_DIAG = 4  # the netlink family
_BY_FAMILY = 20
_DONE, _ERROR = 3, 2
_REQUEST_AND_DUMP = 0x301
_ESTABLISHED, _SYN_RECV, _CLOSE_WAIT = 1, 3, 8
_STATES = 1 << _ESTABLISHED | 1 << _SYN_RECV | 1 << _CLOSE_WAIT
_INFO = 2  # the attribute that holds a tcp_info, and the bit that asks for it is one less
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
#: Family, protocol, attributes, padding, states; then the socket: ports (in the network's order),
#: two addresses, interface, cookie.
_ASKED = struct.Struct("=BBBBI2s2s16s16sI8s")
#: Family, state, timer, retransmissions; then the socket: ports, addresses, interface, cookie;
#: timer, bytes that nobody has read, bytes to be sent, user, inode.
_TOLD = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_BYTES_RECEIVED_AT = 128  # in a tcp_info; an end of file counts as one
_COUNT = struct.Struct("=Q")
_NO_COOKIE = b"\xff" * 8
_ANSWER_BYTES = 65_536


def unheard(family: int, port: int) -> dict[bytes, bool]:
    """Return the clients of a port that nobody has heard, by their own port and address.

    Each with whether it has connected and says nothing, so that it may go on like that.

    family: AF_INET, or AF_INET6 with IPv4 in it where the socket takes both.  Raises OSError
    where it cannot be asked.
    """
    nobody = bytes(16)
    asked = _ASKED.pack(
        *(family, socket.IPPROTO_TCP, 1 << _INFO - 1, 0, _STATES),
        *(port.to_bytes(2, "big"), bytes(2), nobody, nobody, 0, _NO_COOKIE),
    )
    header = _HEADER.pack(_HEADER.size + len(asked), _BY_FAMILY, _REQUEST_AND_DUMP, 1, 0)
    found: dict[bytes, bool] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as ask:
        # The kernel has answered when it was asked: nobody ever waits.
        ask.send(header + asked, socket.MSG_DONTWAIT)
        while _take(ask.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT), found):
            pass
    return found


def _take(data: bytes, found: dict[bytes, bool]) -> bool:
    """Read one answer; False after the last.  Raises OSError for a refusal."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        body = at + _HEADER.size
        if kind == _ERROR:
            raise OSError(-struct.unpack_from("=i", data, body)[0], "the kernel does not tell")
        if kind == _DONE or length < _HEADER.size:
            return False
        _, state, _, _, _, port, _, address, _, _, _, unread, *_ = _TOLD.unpack_from(data, body)
        if state == _SYN_RECV:
            found[port + address] = False
        else:
            received = _bytes_received(data, body + _TOLD.size, at + length)
            if received is not None and received <= unread:
                found[port + address] = not unread
        at += (length + 3) & ~3
    return bool(data)


def _bytes_received(data: bytes, at: int, end: int) -> int | None:
    """Return what has come over a connection; None where the kernel, before 4.1, does not tell."""
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        place = _ATTRIBUTE.size + _BYTES_RECEIVED_AT
        if kind == _INFO and length >= place + _COUNT.size:
            count: int = _COUNT.unpack_from(data, at + place)[0]
            return count
        at += (length + 3) & ~3
    return None
