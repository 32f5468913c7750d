"""Socket facts from netlink: unaccepted and unread clients, listen order, a UNIX socket's path.

An unread client is in a handshake, or has connected and sent nothing, or has sent data that no
process has read.

The kernel reports only on this process's network namespace.

Source: sock_diag(7), netlink(7), rtnetlink(7); linux/inet_diag.h, linux/unix_diag.h, linux/tcp.h;
__inet_hash() in net/ipv4/inet_hashtables.c for the order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from . import netlink, scoped
from .socket_copy import NO_DEVICE, device_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .netlink import Reply

_ESTABLISHED, _SYN_RECV, _CLOSE_WAIT, _LISTEN = 1, 3, 8, 10
_STATES = 1 << _ESTABLISHED | 1 << _SYN_RECV | 1 << _CLOSE_WAIT
#: States in which a process may have the socket open: not CLOSE, TIME_WAIT, LISTEN or handshakes.
_OPEN = 1 << _ESTABLISHED | 1 << 4 | 1 << 5 | 1 << _CLOSE_WAIT | 1 << 9 | 1 << 11
_INFO = 2  # attribute: a tcp_info
_SHOW_INFO = 1 << _INFO - 1
_SHUTDOWN = 8  # attribute: which directions are shut down; always sent
_OPTIONS = 22  # attribute: some socket options, as bits; always sent, since Linux 5.10
#: Family, protocol, attributes, padding, states; then the socket: ports (in network byte order),
#: two addresses, interface, cookie.
_INET_QUERY = struct.Struct("=BBBBI2s2s16s16sI8s")
#: The socket in a query or reply, which identifies a connection.
_CONNECTION = struct.Struct("=2s2s16s16sI8s")
#: Family, state, timer, retransmissions; then the socket: ports, addresses, interface, cookie;
#: timer, unread bytes, bytes to be sent, user, inode.
_INET_REPLY = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
#: Family, protocol, padding, states, inode, attributes, cookie.
_UNIX_QUERY = struct.Struct("=BBHIII8s")
#: Family, type, state, padding, inode, cookie.
_UNIX_REPLY = struct.Struct("=BBBBI8s")
#: The bit that requests an attribute, and the attribute: the socket's file; the clients in a
#: listening socket's queue; the unread and unsent bytes.
_FILE, _PENDING, _QUEUES = (2, 1), (8, 3), (16, 4)
_INODE = struct.Struct("=I")
#: An attribute about a file: the inode's last 32 bits, and the device.
_PLACE = struct.Struct("=II")
_BYTES_RECEIVED_OFFSET = 128  # in a tcp_info; an end of file counts as one byte
_COUNT = struct.Struct("=Q")
_NO_COOKIE = b"\xff" * 8
#: Family, length of the destination; length of the source, TOS, table, origin, scope, type; flags.
_ROUTE = struct.Struct("=BB6BI")
_LOCAL = 2  # the type of a route to this machine
_SO_NETNS_COOKIE = 71

#: The clients that a socket has not accepted: TCP clients by port and address; UNIX clients by
#: inode, in queue order, with 0 for a client that has disconnected.
Line = frozenset[bytes] | tuple[int, ...]


def unread(
    family: int, ports: Collection[int], *, in_handshake: bool = False
) -> dict[int, dict[bytes, bool]]:
    """Return the unread clients of each port, from a single query.

    These are the accepted clients that no process has read from, and the clients in a handshake;
    not the clients that wait to be accepted.  The key is the kernel's identity of the connection,
    for still_unread().  The value is True for a client that has connected and sent nothing: it may
    stay silent.

    family: AF_INET, or AF_INET6, which includes IPv4 clients of a dual-stack socket.
    in_handshake: return only the clients in a handshake.  Raises OSError where sock_diag is
    unavailable.
    """
    states, attributes = (1 << _SYN_RECV, 0) if in_handshake else (_STATES, _SHOW_INFO)
    found: dict[int, dict[bytes, bool]] = {port: {} for port in ports}
    for port, fields, info in _tcp_by_port(family, found, states, attributes):
        if _is_unread(fields, info):
            found[port][_CONNECTION.pack(*fields[4:10])] = _is_silent(fields)
    return found


def still_unread(
    family: int, clients: Iterable[bytes], *, in_handshake: bool = False
) -> dict[bytes, bool]:
    """Return those of these clients that are still unread, and whether each is silent.

    Unlike unread(), this does not walk the kernel's table of all connections, which takes 2 ms or
    more for 262,144 places.  It takes 7 us for each client.

    clients: keys of unread().  in_handshake: return only the clients in a handshake.  Raises
    OSError where sock_diag is unavailable.
    """
    found = {}
    with netlink.connect() as channel:
        for client in clients:
            identity = _CONNECTION.unpack(client)
            try:
                fields, info = _tcp_connection(channel, family, *identity, show=_SHOW_INFO)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                continue  # the client has gone
            if _is_unread(fields, info) and (fields[1] == _SYN_RECV or not in_handshake):
                found[client] = _is_silent(fields)
    return found


def _is_unread(fields: tuple[Any, ...], attributes: bytes) -> bool:
    """Return whether a client is in a handshake, or is accepted and unread."""
    state, left, inode = fields[1], fields[11], fields[-1]
    if state == _SYN_RECV:
        return True
    info = netlink.attribute(attributes, _INFO)
    # A connection has an inode once it is accepted.  Linux before 4.1 does not report the bytes
    # received.
    if not inode or not _STATES >> state & 1 or len(info) < _BYTES_RECEIVED_OFFSET + _COUNT.size:
        return False
    (received,) = _COUNT.unpack_from(info, _BYTES_RECEIVED_OFFSET)
    return bool(received <= left)


def _is_silent(fields: tuple[Any, ...]) -> bool:
    """Return whether an unread client has connected and sent nothing."""
    return fields[1] != _SYN_RECV and not fields[11]


def listening(family: int, port: int, like: Collection[int] = ()) -> dict[int, int]:
    """Return the sockets that listen on a port, by inode, in the order of their listen().

    The value says how connections accepted there are shut down (bits: 1 for reading, 2 for
    writing).
    like: inodes.  Return only sockets with the address and device of one of these.  Raises OSError
    where sock_diag is unavailable.
    """
    replies = list(_tcp(family, port, 1 << _LISTEN))
    places = {fields[6:9:2] for fields, _ in replies if fields[-1] in like}
    found: dict[int, int] = {}
    for fields, attributes in replies:
        if not like or fields[6:9:2] in places:
            found[fields[-1]] = int.from_bytes(
                netlink.attribute(attributes, _SHUTDOWN)[:1], "little"
            )
    # The kernel lists the newest socket first, but appends IPv6 sockets that share a port.
    return found if family == socket.AF_INET6 else dict(reversed(found.items()))


def unaccepted(listening: socket.socket) -> Line:
    """Return the clients that wait to be accepted at any socket of this address.

    Raises OSError where the kernel does not answer, for example for a UNIX socket with about 900
    waiting clients.
    """
    if listening.family == socket.AF_UNIX:
        return tuple(each for (each,) in _INODE.iter_unpack(_unix_attribute(listening, *_PENDING)))
    is_here = _at(listening)
    found: set[bytes] = set()
    port = listening.getsockname()[1]
    for fields, _ in _tcp(listening.family, port, 1 << _ESTABLISHED | 1 << _CLOSE_WAIT):
        _, _, _, _, _, theirs, _, client, *_, inode = fields
        if not inode and is_here(fields):
            found.add(theirs + client)
    return frozenset(found)


def is_waiting(client: socket.socket, server: tuple[str, int], device: int = 0) -> bool:
    """Return whether our own connection to this machine waits to be accepted.

    Return True also while only the server's side has not finished the handshake (TCP_DEFER_ACCEPT):
    the connection is then in no queue.  Looking up a single connection is cheap; a query by port
    walks the table of all connections, 4 ms for 262,144 places.

    device: index of the device that the listener is bound to.  Raises OSError where sock_diag is
    unavailable.
    """
    family = client.family
    (port, address), (ours, our_address) = (
        (port.to_bytes(2, "big"), socket.inet_pton(family, host.partition("%")[0]).ljust(16, b"\0"))
        for host, port in (server, client.getsockname()[:2])
    )
    try:
        with netlink.connect() as channel:
            identity = port, ours, address, our_address, device, _NO_COOKIE
            fields, _ = _tcp_connection(channel, family, *identity)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False  # the connection is closed by now
    state, inode = fields[1], fields[-1]  # of the listening socket if the connection is closed
    return state == _SYN_RECV or (not inode and state in (_ESTABLISHED, _CLOSE_WAIT))


def peer_user(connection: socket.socket) -> int | None:
    """Return the user who made the other end of an accepted IPv4 connection over loopback.

    None: no process has that end open any more.  Raises OSError where sock_diag is unavailable.
    """
    (port, address), (our_port, our_address) = (
        (port.to_bytes(2, "big"), socket.inet_aton(host).ljust(16, b"\0"))
        for host, port in (connection.getpeername(), connection.getsockname())
    )
    try:
        with netlink.connect() as channel:
            identity = port, our_port, address, our_address, 0, _NO_COOKIE
            fields, _ = _tcp_connection(channel, socket.AF_INET, *identity)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    # The kernel reports user 0 for an end without inode.  Without that end, it reports a listener.
    user, inode = fields[-2:]
    return user if inode and fields[5] == our_port else None


def accepted(
    listening: socket.socket, exclude: bytes = b""
) -> tuple[Counter[bytes], Counter[bytes]]:
    """Return the number of connections at a socket's address, by their options: open and waiting.

    Waiting connections are not accepted yet.  A single query gives both, since the kernel walks
    the table of all connections.

    exclude: the key of a client that does not count, see end_of().  Raises OSError where sock_diag
    is unavailable, or before Linux 5.10.
    """
    is_here = _at(listening)
    found: Counter[bytes] = Counter()
    waiting: Counter[bytes] = Counter()
    for fields, attributes in _tcp(listening.family, listening.getsockname()[1], _OPEN):
        if fields[5] + fields[7] == exclude or not is_here(fields):
            continue
        if fields[-1]:
            found[netlink.attribute(attributes, _OPTIONS)] += 1
        elif fields[1] in (_ESTABLISHED, _CLOSE_WAIT):  # otherwise no process has it open any more
            waiting[netlink.attribute(attributes, _OPTIONS)] += 1
    if b"" in found or b"" in waiting:
        raise OSError(errno.EOPNOTSUPP, "the kernel does not report that")
    return found, waiting


def _at(listening: socket.socket) -> Callable[[tuple[Any, ...]], bool]:
    """Return a test whether a reply is about a connection to a socket's address and device."""
    address = socket.inet_pton(listening.family, listening.getsockname()[0])
    device = device_of(listening)

    def is_here(fields: tuple[Any, ...]) -> bool:
        # A connection keeps the device that the listening socket had, even if the device is gone.
        return (not any(address) or fields[6][: len(address)] == address) and (
            fields[8] in (0, device) or device in (0, NO_DEVICE)
        )

    return is_here


def is_elsewhere(sock: socket.socket) -> bool:
    """Return True if a socket was opened in another network namespace (since Linux 5.14)."""
    try:
        with socket.socket(sock.family, socket.SOCK_STREAM) as ours:
            here, there = (
                each.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8) for each in (ours, sock)
            )
    except OSError:
        return False  # unknown: assume that it was not
    return here != there


def why_unreachable(listening: socket.socket, host: str) -> str:
    """Return why our own connections cannot reach a listening socket; "" if they can.

    host: its IP address, or its path or @name.  A test connection would not show this: if another
    machine has the IP address now, the connection would reach that machine.
    """
    if listening.family == socket.AF_UNIX and not host.startswith("@"):
        return ""
    if is_elsewhere(listening):
        return "its socket is of another network namespace"
    if listening.family == socket.AF_UNIX or "%" in host:
        return ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host)
    query = _ROUTE.pack(family, 8 * len(packed), *bytes(7))
    query += netlink.ATTRIBUTE.pack(netlink.ATTRIBUTE.size + len(packed), 1) + packed
    try:
        ((fields, _),) = netlink.query(
            query, _ROUTE, dump=False, kind=netlink.GET_ROUTE, netlink_family=netlink.ROUTES
        )
        is_here = fields[7] == _LOCAL
    except OSError as error:
        is_here = error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH)  # no route
    return "" if is_here else f"no interface has the address {host} now"


def end_of(client: socket.socket, family: int) -> bytes:
    """Return the key of a TCP client in replies about a listener of this family."""
    host, port = client.getsockname()[:2]
    address = socket.inet_pton(client.family, host)
    if client.family == socket.AF_INET and family == socket.AF_INET6:
        address = bytes(10) + b"\xff\xff" + address
    return bytes(port.to_bytes(2, "big") + address.ljust(16, b"\0"))


def none_accepted(before: Line, now: Line) -> bool:
    """Return whether every client of `before` still waits or has disconnected."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        return len(before) <= len(now) and all(
            each in (was, 0) for was, each in zip(before, now, strict=False)
        )
    return frozenset(before) <= frozenset(now)


def address_of(inodes: Collection[int]) -> str | None:
    """Return the address of a TCP listener among these sockets; None if there is none.

    Also None where sock_diag is unavailable.
    """
    for family in (socket.AF_INET, socket.AF_INET6) if inodes else ():
        try:
            for fields, _ in _tcp(family, 0, 1 << _LISTEN):
                if fields[-1] in inodes:
                    port = int.from_bytes(fields[4], "big")
                    if fields[0] == socket.AF_INET:
                        return f"{socket.inet_ntop(socket.AF_INET, fields[6][:4])}:{port}"
                    host = socket.inet_ntop(socket.AF_INET6, fields[6])
                    return f"[{scoped.host_of((host, port, 0, fields[8]))}]:{port}"
        except OSError:
            continue
    return None


def file_of(sock: socket.socket) -> int:
    """Return the inode of a UNIX socket's file, as its last 32 bits; 0 without one.

    The file may have been removed.  Raises OSError where sock_diag is unavailable.
    """
    return int.from_bytes(_unix_attribute(sock, *_FILE)[: _INODE.size], sys.byteorder)


def is_bound_to(sock: socket.socket, file: int) -> bool:
    """Return whether a UNIX socket's file is the one with this descriptor, as far as is known.

    Without /proc only the inode numbers are compared; without sock_diag, nothing.
    """
    inode = os.fstat(file).st_ino & 0xFFFFFFFF
    try:
        key = file_key(sock)
    except OSError:
        return True
    try:
        return key == _device_of(file) << 32 | inode
    except OSError:
        return key & 0xFFFFFFFF == inode


def _device_of(file: int) -> int:
    """Return the kernel's number for a file's file system, which stat(2) hides on some.

    Raises OSError without /proc.  Source: proc(5), mountinfo and fdinfo; UDIAG_SHOW_VFS.
    """
    with open(f"/proc/self/fdinfo/{file}", encoding="ascii") as lines:
        [mount] = [line.split()[1] for line in lines if line.startswith("mnt_id:")]
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for fields in map(str.split, mounts):
            if fields[0] == mount:
                major, minor = map(int, fields[2].split(":"))
                return major << 20 | minor
    raise FileNotFoundError(errno.ENOENT, "an unknown mount")


def file_key(sock: socket.socket) -> int:
    """Return a number for a UNIX socket's file, above 2 ** 32; 0 without a file.

    No other file has this number while the socket, or a connection accepted there, is open.  The
    same name may be another file in another mount namespace.  Raises OSError where sock_diag is
    unavailable.
    """
    return _key_of(_unix_attribute(sock, *_FILE))


def _key_of(place: bytes) -> int:
    if len(place) < _PLACE.size:
        return 0
    inode, device = _PLACE.unpack_from(place)
    return int(device << 32 | inode)


def queue_of_unix(sock: socket.socket) -> tuple[int, int]:
    """Return the length and the limit of a UNIX socket's accept queue.

    Raises OSError where sock_diag is unavailable.
    """
    found = _unix_attribute(sock, *_QUEUES)
    if len(found) < 2 * _INODE.size:
        raise OSError(errno.EOPNOTSUPP, "the kernel does not report that")
    return _INODE.unpack_from(found)[0], _INODE.unpack_from(found, _INODE.size)[0]


def unread_unix() -> dict[int, int]:
    """Return the unread bytes of every connected UNIX socket, by inode; /proc does not show them.

    Empty where sock_diag is unavailable.
    """
    show, wanted = _QUEUES
    found: dict[int, int] = {}
    try:
        for fields, attributes in _unix(1 << _ESTABLISHED, 0, show):
            if queues := netlink.attribute(attributes, wanted):
                found[fields[4]] = _INODE.unpack_from(queues)[0]
    except OSError:
        return {}
    return found


def accepted_unix() -> Iterator[tuple[int, int, int]]:
    """Yield each connection accepted at a UNIX socket's file: file_key(), inode, and unread bytes.

    Clients that wait to be accepted are left out.  Raises OSError where sock_diag is unavailable.
    """
    show = _FILE[0] | _QUEUES[0]
    for fields, attributes in _unix(1 << _ESTABLISHED, 0, show):
        if key := _key_of(netlink.attribute(attributes, _FILE[1])):
            queues = netlink.attribute(attributes, _QUEUES[1])
            yield key, fields[4], _INODE.unpack_from(queues)[0] if queues else 0


def _unix_attribute(sock: socket.socket, show: int, wanted: int) -> bytes:
    """Return an attribute of a UNIX socket, empty where it has none.  Raises OSError."""
    inode = os.fstat(sock.fileno()).st_ino
    answers = [
        netlink.attribute(attributes, wanted) for _, attributes in _unix(0xFFFFFFFF, inode, show)
    ]
    return b"".join(answers)


def _tcp(family: int, port: int, states: int, attributes: int = 0) -> Iterator[Reply]:
    """Query the sockets of a port, 0 for any port.  Raises OSError."""
    any_address = bytes(16)
    query = _INET_QUERY.pack(
        *(family, socket.IPPROTO_TCP, attributes, 0, states),
        *(port.to_bytes(2, "big"), bytes(2), any_address, any_address, 0, _NO_COOKIE),
    )
    return netlink.query(query, _INET_REPLY, dump=True)


def _tcp_connection(channel: socket.socket, family: int, *identity: Any, show: int = 0) -> Reply:
    """Query one connection.  identity: the fields of _CONNECTION.

    Raises OSError, ENOENT if there is no such connection.
    """
    query = _INET_QUERY.pack(family, socket.IPPROTO_TCP, show, 0, 0, *identity)
    (found,) = netlink.replies(channel, query, _INET_REPLY, dump=False)
    return found


def _tcp_by_port(
    family: int, ports: Collection[int], states: int, attributes: int = 0
) -> Iterator[tuple[int, tuple[Any, ...], bytes]]:
    """Query the sockets of several ports; yield each with its port.  Raises OSError.

    Even for one port the kernel walks the table of all connections, so we send a single query.
    """
    by_bytes = {port.to_bytes(2, "big"): port for port in ports}
    queried_port = next(iter(ports)) if len(by_bytes) == 1 else 0
    for fields, found_attributes in _tcp(family, queried_port, states, attributes):
        port = by_bytes.get(fields[4])
        if port is not None:
            yield port, fields, found_attributes


def _unix(states: int, inode: int, show: int) -> Iterator[Reply]:
    """Query a UNIX socket, or with inode 0 all in these states.  Raises OSError."""
    query = _UNIX_QUERY.pack(socket.AF_UNIX, 0, 0, states, inode, show, _NO_COOKIE)
    return netlink.query(query, _UNIX_REPLY, dump=not inode)
