"""The reuseport sibling of a listening socket, and which of the two sockets gets new clients.

Two consecutive generations accept from one socket each (daemon/delivery/shared/).  Sockets 0 and 1
belong to one SO_REUSEPORT group.  For each new connection the kernel runs a one-instruction BPF
filter, which selects the group member by index.  While the two generations share the clients, the
filter first draws a random number for each client.

During a hold (listener_hold.py in that folder) the group has a third member, which answers no
client.  No worker has it, so it is gone if the protector dies.  The filter then selects a missing
member, and the kernel gives each client to a remaining member: a filter of this kind cannot refuse
a client.

While a generation is probed (daemon/ready_probe.py), the filter (bpf.py) also sends connections
with a mark to that generation's socket.  The third member is then the last member, so it takes the
position of a socket that is shut down.  Probes for that socket then get no answer, instead of an
answer from the other generation.

Socket 0 is bound without SO_REUSEPORT.  So binding a port in use fails as usual, and no other
process can bind the port later without SO_REUSEPORT.

A socket that was shut down has left the group; when it listens again, it becomes the last member.

Source: socket(7) for SO_REUSEPORT and SO_ATTACH_REUSEPORT_CBPF; reuseport_select_sock() and
reuseport_detach_sock() in net/core/sock_reuseport.c.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress

from . import accept_tags, bpf, sock_diag, socket_copy
from .cleanup import on_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .scoped import SocketAddress

#: The accept queue's length and limit in the tcp_info of a listening socket (tcp.h).
_QUEUE = struct.Struct("=24x2I")
_KEY_BYTES = 16

NO_MARKS: Mapping[bpf.Mark, int] = {}
#: The shortest timeout, and no timeout.
_SOON, _NEVER = struct.pack("ll", 0, 1), bytes(16)


def prepare(bound: socket.socket) -> None:
    """Steer the group of a bound socket before it listens, so that a sibling gets no clients.

    The socket stays alone at its address until make().
    """
    if bound.family not in (socket.AF_INET, socket.AF_INET6):
        return
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    steer_if_can(bound)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    _tag_if_can(bound, 1)


def steer_if_can(sock: socket.socket) -> None:
    """Steer to member 0, if possible.

    It is impossible with a socket that listens without a group, or whose filters a worker locked.
    """
    with suppress(OSError):
        steer(sock, 0)


def _steer_to_listening(beside: socket.socket) -> None:
    """Steer to a listening socket, before another socket listens beside it.

    Do not steer to a socket after shutdown(): it would get a group of its own, and listen() would
    fail while another group has the address.
    """
    if beside.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        steer_if_can(beside)


def make(first: socket.socket, room: int = 0) -> socket.socket | None:
    """Return a listening socket's new sibling, which gets no clients yet; the caller owns it.

    room: the sibling's backlog, needed if the first socket was shut down; 0: as the first socket.

    Returns None for a UNIX socket, and under TCP_DEFER_ACCEPT: a handshake that waits for data
    could not be distinguished from a handshake that never ends.  Raises OSError.
    """
    if first.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    if first.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT):
        return None
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # Without steering, the kernel would give the sibling every other client from listen() on.  So
    # the filter of socket 0 was attached before socket 0 listened, see prepare().
    _steer_to_listening(first)
    sibling = rebind(first, first.getsockname(), room or backlog(first), other_tag=True)
    with on_error(sibling.close):
        sibling.setblocking(False)
        steer(sibling, 0)  # use the sibling: a worker may have locked the first socket's filters
    return sibling


def queue(listening: socket.socket) -> tuple[int, int]:
    """Return the length and the limit of a socket's accept queue.  Raises OSError."""
    if listening.family == socket.AF_UNIX:
        return sock_diag.queue_of_unix(listening)
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE.size)
    waiting, limit = _QUEUE.unpack(info)
    return waiting, limit


def discard_waiting(listening: socket.socket, count: int) -> None:
    """Accept and close the first `count` waiting clients of an idle socket.  Raises OSError."""
    if not count:
        return
    # All processes with the socket share this timeout, but only briefly, unlike O_NONBLOCK.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SOON)
    try:
        for _ in range(count):
            listening.accept()[0].close()
    finally:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _NEVER)


def backlog(listening: socket.socket) -> int:
    """Return the limit of a socket's accept queue, as the last listen() has set it.

    Raises OSError.
    """
    return queue(listening)[1]


def rebind(
    sock: socket.socket, address: SocketAddress, backlog: int, *, other_tag: bool = False
) -> socket.socket:
    """Return a new listening socket on an address, with the options of `sock`.  Raises OSError.

    other_tag: the connections of the two sockets get different accept tags (accept_tags.py).
    """
    made = socket_copy.bind_beside(sock, address)
    with on_error(made.close):
        tag = accept_tags.tag_of(sock)
        _tag_if_can(made, (2 if tag != 2 else 1) if other_tag else tag)
        made.listen(backlog)
    return made


def steer(
    sock: socket.socket,
    member: int,
    marked: Mapping[bpf.Mark, int] = NO_MARKS,
    drawn: int = 0,
    share: int = 0,
) -> None:
    """Steer new clients to a member of the socket's group, counted from 0.  Raises OSError.

    marked: the member for each mark.  drawn: the member that gets `share` ten thousandths.
    Members are in the order of listen(2); when a member leaves, the last member takes its position.
    A handshake finishes at the member at which it began.
    """
    bpf.attach(sock, bpf.SO_ATTACH_REUSEPORT_CBPF, bpf.selecting(member, marked, drawn, share))


def reserve(sock: socket.socket, address: SocketAddress) -> socket.socket:
    """Return a bound socket that does not listen yet.

    silence() adds it to the group, so that clients get no answer.  Raises OSError, also if we may
    not bind the address.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return socket_copy.bind_beside(sock, address)


def enlist(reserved: socket.socket, tag: int, backlog: int, beside: socket.socket | None) -> None:
    """Turn a reserved socket into a listening member of the group.  Raises OSError.

    beside: a member of the group, which gets new clients until the next steer().
    """
    socket_copy.reset(reserved)
    _tag_if_can(reserved, tag)
    if beside is not None:
        beside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _steer_to_listening(beside)
    reserved.listen(backlog)
    if beside is not None:
        steer(reserved, 0)


def silence(reserved: socket.socket) -> None:
    """Add a reserved socket to its group as the last member, until shutdown().  Raises OSError.

    The socket drops the first packet of each client, whose kernel tries again: it demands a
    signature by a random key.  A kernel without signatures drops only packets whose TTL is below
    255.  Source: IP_MINTTL in ip(7), tcp_v4_rcv() in tcp_ipv4.c; sk_acceptq_is_full() in sock.h for
    the backlog of 0.
    """
    with suppress(OSError):
        socket_copy.demand_signature(reserved, os.urandom(_KEY_BYTES))
    for level, option in socket_copy.least_ttl(reserved):
        reserved.setsockopt(level, option, bpf.MOST_TTL)
    reserved.listen(0)


def refuse_new(listening: socket.socket) -> None:
    """Refuse new clients; clients that have connected can still be accepted.  Raises OSError.

    A socket that is bound to a device gets only clients of that device.  A handshake under way
    finishes, because it keeps the device that the socket had when the handshake began.  A filter
    would work, too, but since 2026 kernels require CAP_NET_ADMIN for a filter on a TCP socket.
    """
    try:
        socket_copy.leave_devices(listening)
    except OSError:
        # The socket has a device already, or the kernel is older than 5.7 and requires CAP_NET_RAW.
        bpf.attach(listening, bpf.SO_ATTACH_FILTER, bpf.NO_NEW_CLIENTS)


def _tag_if_can(sock: socket.socket, tag: int) -> None:
    with suppress(OSError):  # on failure its connections are not counted
        accept_tags.tag(sock, tag)
