"""Socket facts from sock_diag: unaccepted and unread clients, listen order, a UNIX socket's path.

Unread clients are those whose handshake is under way, those that have connected and sent nothing,
and those whose data no process has read.

Only for this process's network namespace.

Source: sock_diag(7), netlink(7); linux/inet_diag.h, linux/unix_diag.h, linux/tcp.h;
__inet_hash() in net/ipv4/inet_hashtables.c for the order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Collection, Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    #: What is told of a socket, and its attributes.
    Told = tuple[tuple[Any, ...], bytes]

_SOCK_DIAG = 4  # the netlink family
_BY_FAMILY = 20
_DONE, _ERROR = 3, 2
_REQUEST, _REQUEST_AND_DUMP = 0x001, 0x301
_ESTABLISHED, _SYN_RECV, _CLOSE_WAIT, _LISTEN = 1, 3, 8, 10
_STATES = 1 << _ESTABLISHED | 1 << _SYN_RECV | 1 << _CLOSE_WAIT
#: Those in which a process may have it open: all but CLOSE, TIME_WAIT, LISTEN and the handshake's.
_OPEN = 1 << _ESTABLISHED | 1 << 4 | 1 << 5 | 1 << _CLOSE_WAIT | 1 << 9 | 1 << 11
_INFO = 2  # the attribute that holds a tcp_info, and the bit that asks for it is one less
_SHUTDOWN = 8  # one that holds how a socket was shut down; it comes unasked
_OPTIONS = 22  # one that holds some of its options, as bits; so does it, since 5.10
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
_TOLD_UNIX = struct.Struct("=BBBBI8s")
#: What is asked for, and the attribute that tells it: the file; the clients of one that listens;
#: the bytes to be read, and to be sent.
_FILE, _PENDING, _QUEUES = (2, 1), (8, 3), (16, 4)
_BOUND_AS = (1, 0)
_INODE = struct.Struct("=I")  # and of a file the device
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_BYTES_RECEIVED_AT = 128  # in a tcp_info; an end of file counts as one
_COUNT = struct.Struct("=Q")
_NO_COOKIE = b"\xff" * 8
_ANSWER_BYTES = 65_536

#: The clients that wait to be accepted at a socket: by port and address; of a UNIX socket by inode,
#: in their order, 0 for one that has gone meanwhile.
Line = frozenset[bytes] | tuple[int, ...]


def unread(family: int, port: int, *, accepted: bool = False) -> dict[bytes, bool]:
    """Return the unread clients of a port, by their own port and address.

    Each with whether it has connected and says nothing, so that it may go on like that.

    accepted: without those that wait to be accepted.

    family: AF_INET, or AF_INET6 with IPv4 in it where the socket takes both.  Raises OSError
    where it cannot be asked.
    """
    return unread_by_port(family, (port,), accepted=accepted)[port]


def unread_by_port(
    family: int, ports: Collection[int], *, accepted: bool = False
) -> dict[int, dict[bytes, bool]]:
    """Return what unread() does for each of several ports, by one request for all."""
    found: dict[int, dict[bytes, bool]] = {port: {} for port in ports}
    for port, told, attributes in _tcp_by_port(family, found, _STATES, 1 << _INFO - 1):
        _, state, _, _, _, theirs, _, client, *_, left, _, _, inode = told
        if state == _SYN_RECV:
            found[port][theirs + client] = False
        elif inode or not accepted:  # it has one from the moment at which it is accepted
            info = _attribute(attributes, _INFO)
            if len(info) < _BYTES_RECEIVED_AT + _COUNT.size:
                continue  # the kernel, before 4.1, does not tell what has come
            if _COUNT.unpack_from(info, _BYTES_RECEIVED_AT)[0] <= left:
                found[port][theirs + client] = not left
    return found


def listening(family: int, port: int, like: Collection[int] = ()) -> dict[int, int]:
    """Return the sockets that listen on a port, by inode, the last that began to at the end.

    Each with how accepted ones find themselves shut down (1: for reading, 2: for writing).
    like: only those at the addresses and devices of these.  Raises OSError where it cannot be
    asked.
    """
    all_told = list(_tcp(family, port, 1 << _LISTEN))
    places = {told[6:9:2] for told, _ in all_told if told[-1] in like}
    found: dict[int, int] = {}
    for told, attributes in all_told:
        if not like or told[6:9:2] in places:
            found[told[-1]] = int.from_bytes(_attribute(attributes, _SHUTDOWN)[:1], "little")
    # The kernel puts each in front of the others; but those of IPv6 that share a port, behind.
    return found if family == socket.AF_INET6 else dict(reversed(found.items()))


def unaccepted(listening: socket.socket) -> Line:
    """Return the clients that wait to be accepted; of all sockets of the same address.

    Raises OSError where it cannot be asked; a UNIX socket with some 900 that wait is one.
    """
    if listening.family == socket.AF_UNIX:
        return tuple(each for (each,) in _INODE.iter_unpack(_of_unix(listening, *_PENDING)))
    address = _address(listening)
    found: set[bytes] = set()
    port = listening.getsockname()[1]
    for told, _ in _tcp(listening.family, port, 1 << _ESTABLISHED | 1 << _CLOSE_WAIT):
        _, _, _, _, _, theirs, ours, client, *_, inode = told
        if not inode and (not any(address) or ours[: len(address)] == address):
            found.add(theirs + client)
    return frozenset(found)


def is_waiting(client: socket.socket, server: tuple[str, int], device: int = 0) -> bool:
    """Return whether a connection of ours to this machine is yet to be accepted.

    Also of one whose handshake the server's side has not finished, though ours has
    (TCP_DEFER_ACCEPT): it is in no queue.  For all of a port the kernel goes through the table of
    all connections, 4 ms for one of 262,144 places; this one it looks up there.

    device: to which the listener is bound, by its index.  Raises OSError where it cannot be asked.
    """
    family = client.family
    (port, address), (ours, our_address) = (
        (port.to_bytes(2, "big"), socket.inet_pton(family, host.partition("%")[0]).ljust(16, b"\0"))
        for host, port in (server, client.getsockname()[:2])
    )
    asked = _ASKED.pack(
        *(family, socket.IPPROTO_TCP, 0, 0, 0),
        *(port, ours, address, our_address, device, _NO_COOKIE),
    )
    try:
        ((told, _),) = _ask(asked, _TOLD, dump=False)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False  # closed by now
    state, inode = told[1], told[-1]  # of the socket that listens, where that is closed by now
    return state == _SYN_RECV or (not inode and state in (_ESTABLISHED, _CLOSE_WAIT))


def handshakes(family: int, port: int) -> frozenset[bytes]:
    """Return the clients of a port that are about to connect, by their own port and address.

    Raises OSError where it cannot be asked.
    """
    return frozenset(handshakes_by_port(family, (port,))[port])


def handshakes_by_port(family: int, ports: Collection[int]) -> dict[int, set[bytes]]:
    """Return what handshakes() does for each of several ports, by one request for all."""
    found: dict[int, set[bytes]] = {port: set() for port in ports}
    for port, told, _ in _tcp_by_port(family, found, 1 << _SYN_RECV):
        found[port].add(told[5] + told[7])
    return found


def accepted(
    listening: socket.socket, but: bytes = b"", *, waiting: bool = False
) -> Counter[bytes]:
    """Return how many connections at a socket's address processes have open, by their options.

    but: the end of a client that does not count, see end_of().  waiting: also those that wait to be
    accepted.  Raises OSError where it cannot be asked, or is not told (before Linux 5.10).
    """
    address = _address(listening)
    found: Counter[bytes] = Counter()
    for told, attributes in _tcp(listening.family, listening.getsockname()[1], _OPEN):
        if told[5] + told[7] == but:
            continue
        # Without an inode are those that wait, and those that no process has open any more.
        counts = told[-1] or (waiting and told[1] in (_ESTABLISHED, _CLOSE_WAIT))
        if counts and (not any(address) or told[6][: len(address)] == address):
            found[_attribute(attributes, _OPTIONS)] += 1
    if b"" in found:
        raise OSError(errno.EOPNOTSUPP, "the kernel does not tell")
    return found


def _address(listening: socket.socket) -> bytes:
    """Return the address that a socket is bound to; all zeros where it is any."""
    return socket.inet_pton(listening.family, listening.getsockname()[0].partition("%")[0])


def end_of(client: socket.socket, family: int) -> bytes:
    """Return what tells a TCP client in the answers about a listener of a family."""
    host, port = client.getsockname()[:2]
    address = socket.inet_pton(client.family, host)
    if client.family == socket.AF_INET and family == socket.AF_INET6:
        address = bytes(10) + b"\xff\xff" + address
    return bytes(port.to_bytes(2, "big") + address.ljust(16, b"\0"))


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
    for family in (socket.AF_INET, socket.AF_INET6) if inodes else ():
        try:
            for told, _ in _tcp(family, 0, 1 << _LISTEN):
                if told[-1] in inodes:
                    of_ipv6 = told[0] == socket.AF_INET6
                    host = socket.inet_ntop(told[0], told[6] if of_ipv6 else told[6][:4])
                    port = int.from_bytes(told[4], "big")
                    return f"[{host}]:{port}" if of_ipv6 else f"{host}:{port}"
        except OSError:
            continue
    return None


def file_of(one: socket.socket) -> int:
    """Return the inode of a UNIX socket's file, as its last 32 bits; 0 without one.

    Also of one that has been removed.  Raises OSError where it cannot be asked.
    """
    return int.from_bytes(_of_unix(one, *_FILE)[: _INODE.size], sys.byteorder)


def queue_of_unix(one: socket.socket) -> tuple[int, int]:
    """Return how many clients of a UNIX socket wait to be accepted, and how many may.

    Raises OSError where it cannot be asked.
    """
    found = _of_unix(one, *_QUEUES)
    if len(found) < 2 * _INODE.size:
        raise OSError(errno.EOPNOTSUPP, "the kernel does not tell")
    return _INODE.unpack_from(found)[0], _INODE.unpack_from(found, _INODE.size)[0]


def unread_unix() -> dict[int, int]:
    """Return inode -> bytes to be read, of all connected UNIX sockets; /proc does not say.

    Empty where it may not be asked.
    """
    show, wanted = _QUEUES
    found: dict[int, int] = {}
    try:
        for told, attributes in _unix(1 << _ESTABLISHED, 0, show):
            if queues := _attribute(attributes, wanted):
                found[told[4]] = _INODE.unpack_from(queues)[0]
    except OSError:
        return {}
    return found


def accepted_unix() -> Iterator[tuple[str, int, int]]:
    """Yield each accepted connection of a UNIX socket: bound name, inode, and unread bytes.

    Without those that wait to be accepted.  Raises OSError where it cannot be asked.
    """
    show = _BOUND_AS[0] | _QUEUES[0]
    for told, attributes in _unix(1 << _ESTABLISHED, 0, show):
        if name := _attribute(attributes, _BOUND_AS[1]).rstrip(b"\0"):
            queues = _attribute(attributes, _QUEUES[1])
            yield os.fsdecode(name), told[4], _INODE.unpack_from(queues)[0] if queues else 0


def _of_unix(one: socket.socket, show: int, wanted: int) -> bytes:
    """Return an attribute of a UNIX socket, empty where it has none.  Raises OSError."""
    inode = os.fstat(one.fileno()).st_ino
    answers = [_attribute(attributes, wanted) for _, attributes in _unix(0xFFFFFFFF, inode, show)]
    return b"".join(answers)


def _tcp(family: int, port: int, states: int, attributes: int = 0) -> Iterator[Told]:
    """Ask for the sockets of a port, 0 for those of any.  Raises OSError."""
    any_address = bytes(16)
    asked = _ASKED.pack(
        *(family, socket.IPPROTO_TCP, attributes, 0, states),
        *(port.to_bytes(2, "big"), bytes(2), any_address, any_address, 0, _NO_COOKIE),
    )
    return _ask(asked, _TOLD, dump=True)


def _tcp_by_port(
    family: int, ports: Collection[int], states: int, attributes: int = 0
) -> Iterator[tuple[int, tuple[Any, ...], bytes]]:
    """Ask for the sockets of several ports; yield the port with each.  Raises OSError.

    For one port as for all the kernel goes through the table of all connections.
    """
    by_bytes = {port.to_bytes(2, "big"): port for port in ports}
    asked = next(iter(ports)) if len(by_bytes) == 1 else 0
    for told, more in _tcp(family, asked, states, attributes):
        port = by_bytes.get(told[4])
        if port is not None:
            yield port, told, more


def _unix(states: int, inode: int, show: int) -> Iterator[Told]:
    """Ask for a UNIX socket, or with 0 as inode for all in these states.  Raises OSError."""
    asked = _ASKED_UNIX.pack(socket.AF_UNIX, 0, 0, states, inode, show, _NO_COOKIE)
    return _ask(asked, _TOLD_UNIX, dump=not inode)


def _ask(asked: bytes, form: struct.Struct, *, dump: bool) -> Iterator[Told]:
    """Ask, and yield what is told of each socket, and its attributes.

    dump: there are many answers, and an end to them.  Raises OSError, for a refusal too.
    """
    flags = _REQUEST_AND_DUMP if dump else _REQUEST
    header = _HEADER.pack(_HEADER.size + len(asked), _BY_FAMILY, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as ask:
        # The kernel has answered when it was asked: nothing here ever waits.
        ask.send(header + asked, socket.MSG_DONTWAIT)
        while data := ask.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT):
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, at)
                body = at + _HEADER.size
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", data, body)[0]
                    raise OSError(number, "the kernel does not tell")
                if kind == _DONE or length < _HEADER.size:
                    return
                yield form.unpack_from(data, body), data[body + form.size : at + length]
                at += (length + 3) & ~3
            if not dump:
                return


def _attribute(attributes: bytes, wanted: int) -> bytes:
    """Return the content of an attribute, empty where there is none."""
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == wanted:
            return attributes[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return b""
