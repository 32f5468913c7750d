"""Socket facts from sock_diag: unaccepted and unread clients, listen order, a UNIX socket's path.

Unread clients are those whose handshake is under way, those that have connected and sent nothing,
and those whose data no process has read.

Only for this process's network namespace.

Source: sock_diag(7), netlink(7); linux/inet_diag.h, linux/unix_diag.h, linux/tcp.h;
__inet_hash() in net/ipv4/inet_hashtables.c for the order.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator

_SOCK_DIAG = 4  # the netlink family
_BY_FAMILY = 20
_DONE, _ERROR = 3, 2
_REQUEST, _REQUEST_AND_DUMP = 0x001, 0x301
_ESTABLISHED, _SYN_RECV, _CLOSE_WAIT, _LISTEN = 1, 3, 8, 10
_STATES = 1 << _ESTABLISHED | 1 << _SYN_RECV | 1 << _CLOSE_WAIT
_INFO = 2  # the attribute that holds a tcp_info, and the bit that asks for it is one less
_SHUTDOWN = 8  # one that holds how a socket was shut down; it comes unasked
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
#: Family, protocol, attributes, padding, states; then the socket: ports (in the network's order),
#: two addresses, interface, cookie.
_ASKED = struct.Struct("=BBBBI2s2s16s16sI8s")
#: Family, state, timer, retransmissions; then the socket: ports, addresses, interface, cookie;
#: timer, unread bytes, bytes to be sent, user, inode.
_TOLD = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
#: Family, protocol, padding, states, inode, attributes, cookie.
_ASKED_UNIX = struct.Struct("=BBHIII8s")
#: Family, type, state, padding, inode, cookie.
_TOLD_UNIX_BYTES, _UNIX_INODE_AT = 16, 4
#: What is asked for, and the attribute that tells it: the file; who connects to one that listens;
#: the bytes to be read, and to be sent.
_FILE, _PENDING, _QUEUES = (2, 1), (8, 3), (16, 4)
_INODE = struct.Struct("=I")  # and of a file the device
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_BYTES_RECEIVED_AT = 128  # in a tcp_info; an end of file counts as one
_COUNT = struct.Struct("=Q")
_NO_COOKIE = b"\xff" * 8
_ANSWER_BYTES = 65_536

#: Who waits to be accepted at a socket: by port and address; of a UNIX socket by inode, in their
#: order, 0 for one who has gone meanwhile.
Line = frozenset[bytes] | tuple[int, ...]


def unread(family: int, port: int, *, accepted: bool = False) -> dict[bytes, bool]:
    """Return the unread clients of a port, by their own port and address.

    Each with whether it has connected and says nothing, so that it may go on like that.

    accepted: without those who wait for somebody to accept them.

    family: AF_INET, or AF_INET6 with IPv4 in it where the socket takes both.  Raises OSError
    where it cannot be asked.
    """
    found: dict[bytes, bool] = {}
    _ask(family, port, _STATES, 1 << _INFO - 1, lambda data: _take(data, found, accepted))
    return found


def listening(family: int, port: int) -> dict[int, int]:
    """Return the sockets that listen on a port, by inode, who began last at the end.

    Each with how accepted ones find themselves shut down (1: for reading, 2: for writing).
    Raises OSError where it cannot be asked.
    """
    found: dict[int, int] = {}
    _ask(family, port, 1 << _LISTEN, 0, lambda data: _take_listening(data, found))
    # The kernel puts each in front of the others; but those of IPv6 that share a port, behind.
    return found if family == socket.AF_INET6 else dict(reversed(found.items()))


def unaccepted(listening: socket.socket) -> Line:
    """Return who waits to be accepted; of all sockets of the same address.

    Raises OSError where it cannot be asked; a UNIX socket with some 900 who wait is one.
    """
    if listening.family == socket.AF_UNIX:
        return tuple(each for (each,) in _INODE.iter_unpack(_of_unix(listening, *_PENDING)))
    host, port = listening.getsockname()[:2]
    address = socket.inet_pton(listening.family, host.partition("%")[0])
    found: set[bytes] = set()

    def take(data: bytes) -> bool:
        for body, _ in _messages(data):
            if not body:
                return False
            _, _, _, _, _, theirs, ours, client, *_, inode = _TOLD.unpack_from(data, body)
            if not inode and (not any(address) or ours[: len(address)] == address):
                found.add(theirs + client)
        return bool(data)

    _ask(listening.family, port, 1 << _ESTABLISHED | 1 << _CLOSE_WAIT, 0, take)
    return frozenset(found)


def stands(before: Line, now: Line) -> bool:
    """Whether no client of a backlog was accepted since: all wait, or have disconnected."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        return len(before) <= len(now) and all(
            each in (was, 0) for was, each in zip(before, now, strict=False)
        )
    return frozenset(before) <= frozenset(now)


def address_of(inodes: Collection[int]) -> str | None:
    """Return an address of one of these sockets that listens for TCP; None: none does.

    None too where sock_diag is unavailable.
    """
    found: list[str] = []

    def take(data: bytes) -> bool:
        for body, _ in _messages(data):
            if not body:
                return False
            told = _TOLD.unpack_from(data, body)
            if told[-1] in inodes:
                of_ipv6 = told[0] == socket.AF_INET6
                host = socket.inet_ntop(told[0], told[6] if of_ipv6 else told[6][:4])
                port = int.from_bytes(told[4], "big")
                found.append(f"[{host}]:{port}" if of_ipv6 else f"{host}:{port}")
        return bool(data)

    for family in (socket.AF_INET, socket.AF_INET6) if inodes else ():
        try:
            _ask(family, 0, 1 << _LISTEN, 0, take)
        except OSError:
            continue
    return found[0] if found else None


def file_of(one: socket.socket) -> int:
    """Return the inode of a UNIX socket's file, as its last 32 bits; 0 without one.

    Also of one that has been removed.  Raises OSError where it cannot be asked.
    """
    found = _of_unix(one, *_FILE)
    return int(_INODE.unpack_from(found)[0]) if found else 0


def unread_unix() -> dict[int, int]:
    """Return inode -> bytes to be read, of all connected UNIX sockets; /proc does not say.

    Empty where it may not be asked.
    """
    asked = _ASKED_UNIX.pack(socket.AF_UNIX, 0, 0, 1 << _ESTABLISHED, 0, _QUEUES[0], _NO_COOKIE)
    found: dict[int, int] = {}

    def take(data: bytes) -> bool:
        for body, end in _messages(data):
            if not body:
                return False
            place = _attribute(data, body + _TOLD_UNIX_BYTES, end, _QUEUES[1])
            if place is not None:
                inode = _INODE.unpack_from(data, body + _UNIX_INODE_AT)[0]
                found[inode] = _INODE.unpack_from(data, place[0])[0]
        return bool(data)

    try:
        _exchange(asked, _REQUEST_AND_DUMP, take)
    except OSError:
        return {}
    return found


def _of_unix(one: socket.socket, show: int, wanted: int) -> bytes:
    """Return an attribute of a UNIX socket, empty where it has none.  Raises OSError."""
    inode = os.fstat(one.fileno()).st_ino
    asked = _ASKED_UNIX.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, show, _NO_COOKIE)
    answers: list[bytes] = []

    def take(data: bytes) -> bool:
        for body, end in _messages(data):
            place = _attribute(data, body + _TOLD_UNIX_BYTES, end, wanted) if body else None
            if place is not None:
                answers.append(data[place[0] : sum(place)])
        return False  # it is one answer

    _exchange(asked, _REQUEST, take)
    return b"".join(answers)


def _ask(
    family: int, port: int, states: int, attributes: int, take: Callable[[bytes], bool]
) -> None:
    """Ask for the sockets of a port; `take` says whether more is to come.  Raises OSError."""
    nobody = bytes(16)
    asked = _ASKED.pack(
        *(family, socket.IPPROTO_TCP, attributes, 0, states),
        *(port.to_bytes(2, "big"), bytes(2), nobody, nobody, 0, _NO_COOKIE),
    )
    _exchange(asked, _REQUEST_AND_DUMP, take)


def _exchange(asked: bytes, flags: int, take: Callable[[bytes], bool]) -> None:
    """Ask, and have each answer taken, while more is to come.  Raises OSError."""
    header = _HEADER.pack(_HEADER.size + len(asked), _BY_FAMILY, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as ask:
        # The kernel has answered when it was asked: nobody ever waits.
        ask.send(header + asked, socket.MSG_DONTWAIT)
        while take(ask.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT)):
            pass


def _messages(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each socket's part of an answer begins and ends; (0, 0) after the last one.

    Raises OSError for a refusal.
    """
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        body = at + _HEADER.size
        if kind == _ERROR:
            raise OSError(-struct.unpack_from("=i", data, body)[0], "the kernel does not tell")
        if kind == _DONE or length < _HEADER.size:
            yield 0, 0
            return
        yield body, at + length
        at += (length + 3) & ~3


def _take_listening(data: bytes, found: dict[int, int]) -> bool:
    for body, end in _messages(data):
        if not body:
            return False
        shut = _attribute(data, body + _TOLD.size, end, _SHUTDOWN)
        found[_TOLD.unpack_from(data, body)[-1]] = data[shut[0]] if shut else 0
    return bool(data)


def _take(data: bytes, found: dict[bytes, bool], accepted: bool) -> bool:
    """Read one answer; False after the last."""
    for body, end in _messages(data):
        if not body:
            return False
        _, state, _, _, _, port, _, address, *_, unread, _, _, inode = _TOLD.unpack_from(data, body)
        if state == _SYN_RECV:
            found[port + address] = False
        elif inode or not accepted:  # it has one from the moment at which it is accepted
            received = _bytes_received(data, body + _TOLD.size, end)
            if received is not None and received <= unread:
                found[port + address] = not unread
    return bool(data)


def _bytes_received(data: bytes, at: int, end: int) -> int | None:
    """Return what has come over a connection; None where the kernel, before 4.1, does not tell."""
    found = _attribute(data, at, end, _INFO)
    if found is None or found[1] < _BYTES_RECEIVED_AT + _COUNT.size:
        return None
    count: int = _COUNT.unpack_from(data, found[0] + _BYTES_RECEIVED_AT)[0]
    return count


def _attribute(data: bytes, at: int, end: int, wanted: int) -> tuple[int, int] | None:
    """Return where the content of an attribute begins, and how long it is."""
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == wanted:
            return at + _ATTRIBUTE.size, length - _ATTRIBUTE.size
        at += (length + 3) & ~3
    return None
