"""The reuseport sibling of a listening socket, and which of the two gets new clients.

Two consecutive generations accept from one socket each (daemon/delivery/shared/).  Sockets 0 and
1 belong to one SO_REUSEPORT group; a one-instruction BPF filter selects the group member by index.
The kernel runs it for each new connection.

During a hold (listener_hold.py there) the group has a third member, which answers no client.  No
worker has it: without us it is gone, and the kernel, whose filter then names no member, gives each
client to one of those that are left.  A filter of this kind cannot refuse one.

While a generation is asked (daemon/asking.py), the filter has more: it
sends connections with a mark to that generation's socket.  The mark of IPv4 is a source address
of 127/8 drawn at random, which no packet from a network may have; of IPv6, with its one loopback
address, that with a traffic class drawn at random and the most hops, which no system begins with
unless told to.  Both stand in front of any options.  The third member is there, too, as the last
one: so it takes the position of one that is shut down, and what was for that gets no answer,
instead of one from the other generation.

Socket 0 is bound without SO_REUSEPORT, so that a port in use is refused as usual, and no
other process can bind the port later without SO_REUSEPORT.

A socket that was shut down has left the group; when it listens again it is the last member.

Source: socket(7) for SO_REUSEPORT and SO_ATTACH_REUSEPORT_CBPF; reuseport_select_sock() and
reuseport_detach_sock() in net/core/sock_reuseport.c; SKF_NET_OFF in linux/filter.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from ..model.lazy_dataclass import frozen
from . import accept_marks, sock_diag
from .cleanup import on_error

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_BINDTOIFINDEX = 62
#: Which of a socket's buffers have a size that was asked for, and so are not adapted (since 5.14).
_SO_BUF_LOCK = 72
#: No network device ever has this number.
NO_DEVICE = 0x7FFFFFFF
_INSTRUCTION = struct.Struct("HBBI")
_PROGRAM = struct.Struct("HP")
_RETURN = 0x06
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_AND, _SHIFT_RIGHT, _IF_EQUAL = 0x54, 0x74, 0x15
#: Where the IP header begins, whatever is in front of it.
_IP = 0x1_0000_0000 - 0x10_0000
_IPV6_TRAFFIC_CLASS, _IPV6_HOPS = 67, 16
#: Of linux/in.h and linux/in6.h; the socket module has no names for them.
IP_FREEBIND = 15
IP_MINTTL = 21
IPV6_MINHOPCOUNT = 73
IPV6_TRANSPARENT = 75
#: Where tcp_info holds the accept queue's length and limit of a listening socket (tcp.h).
_QUEUE = struct.Struct("=24x2I")

#: A socket filter that drops segments with SYN and without ACK and passes the rest, so that
#: no new client comes while handshakes that are under way finish.
_NO_NEW_CLIENTS = (
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (_RETURN, 0, 0, 0),  # drop
    (_RETURN, 0, 0, 0xFFFFFFFF),  # pass
)

#: No packet has more left; nearly all systems let theirs begin with 64 or 128.
_MOST_TTL = 255

#: What accepted connections inherit, or what the address is bound with.
_COPIED = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    # Also of one that is dead: it holds the port as long as a worker has it.
    (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_PRIORITY),
    (socket.SOL_SOCKET, socket.SO_MARK),
    (socket.SOL_SOCKET, socket.SO_RCVBUF),
    (socket.SOL_SOCKET, socket.SO_SNDBUF),
    (socket.IPPROTO_IP, IP_FREEBIND),
    (socket.IPPROTO_IP, socket.IP_TRANSPARENT),
    (socket.IPPROTO_IP, socket.IP_TOS),
    (socket.IPPROTO_IP, socket.IP_TTL),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    (socket.IPPROTO_TCP, socket.TCP_FASTOPEN),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT),
)
_OF_IPV6 = (
    (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    (socket.IPPROTO_IPV6, IPV6_TRANSPARENT),
)
#: The kernel doubles what is set, and tells the double.
_DOUBLED = ((socket.SOL_SOCKET, socket.SO_RCVBUF), (socket.SOL_SOCKET, socket.SO_SNDBUF))
_TEXTS = (
    (socket.SOL_SOCKET, socket.SO_BINDTODEVICE),
    (socket.IPPROTO_TCP, socket.TCP_CONGESTION),
)
_NAME_BYTES = 16
NO_MARKS: Mapping[Mark, int] = {}
#: A time that is over at once, and none.
_SOON, _NEVER = struct.pack("ll", 0, 1), bytes(16)
#: What the kernel begins with: no time-outs, no linger, and one byte is enough to tell of.
_HARMLESS = (
    (socket.SO_RCVTIMEO, _NEVER),
    (socket.SO_SNDTIMEO, bytes(16)),
    (socket.SO_LINGER, bytes(8)),
    (socket.SO_RCVLOWAT, 1),
)


def prepare(bound: socket.socket) -> None:
    """Steer the group of one that does not listen yet, so that one that joins it gets no clients.

    It is alone on its address until make().
    """
    if bound.family not in (socket.AF_INET, socket.AF_INET6):
        return
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    steer_if_can(bound)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    _mark_if_can(bound, 1)


def steer_if_can(one: socket.socket) -> None:
    """Steer to member 0 where that can be had: not where it listens, in no group yet.

    Nor where a worker has locked its filters; then its sibling can.
    """
    with suppress(OSError):
        steer(one, 0)


def make(first: socket.socket) -> socket.socket | None:
    """Return a sibling of a listening socket, which gets no clients yet; the caller owns it.

    None for one that is not TCP, or that waits for data before it tells of a client
    (TCP_DEFER_ACCEPT): its handshakes could not be told from those that never end.
    Raises OSError where the system has none.
    """
    if first.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    if first.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT):
        return None
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # From listen() on the kernel gives the sibling every other client, until the group is steered:
    # the filter of socket 0 is from before it listened, see prepare().
    steer_if_can(first)
    sibling = rebind(first, first.getsockname(), backlog(first), other_mark=True)
    with on_error(sibling.close):
        sibling.setblocking(False)
        steer(sibling, 0)  # it is of the same group; the filters of the first may be locked
    return sibling


def queue(listening: socket.socket) -> tuple[int, int]:
    """Return how many clients wait to be accepted, and how many may.  Raises OSError."""
    if listening.family == socket.AF_UNIX:
        return sock_diag.queue_of_unix(listening)
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE.size)
    waiting, limit = _QUEUE.unpack(info)
    return waiting, limit


def discard_waiting(listening: socket.socket, count: int) -> None:
    """Close the first that wait to be accepted, where no process accepts.  Raises OSError."""
    if not count:
        return
    # Of all processes that have it the flag for not waiting would be; and so is this, for a moment.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SOON)
    try:
        for _ in range(count):
            listening.accept()[0].close()
    finally:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _NEVER)


def device_of(listening: socket.socket) -> int:
    """Return the index of the device that it is bound to, 0: none.  Raises OSError."""
    return listening.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)


def device_is_gone(listening: socket.socket) -> bool:
    """Whether it is bound to a device that does not exist, and so gets no client."""
    try:
        listening.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _NAME_BYTES)
    except OSError as error:
        return error.errno == errno.ENODEV
    return False


def backlog(listening: socket.socket) -> int:
    """Return how many may wait to be accepted: the last listen() has said it.  Raises OSError."""
    return queue(listening)[1]


def rebind(
    one: socket.socket, address: tuple[str, int], backlog: int, *, other_mark: bool = False
) -> socket.socket:
    """Return another one that listens on an address, with the options of `one`.  Raises OSError.

    other_mark: its connections are to be told from those of `one` (accept_marks.py).
    """
    made = _bind_beside(one, address)
    with on_error(made.close):
        mark = accept_marks.mark_of(one)
        _mark_if_can(made, (2 if mark != 2 else 1) if other_mark else mark)
        made.listen(backlog)
    return made


def _bind_beside(one: socket.socket, address: tuple[str, int]) -> socket.socket:
    made = socket.socket(one.family, socket.SOCK_STREAM)
    with on_error(made.close):
        _copy(one, made)
        made.bind(address)
    return made


def reset(listening: socket.socket) -> None:
    """Take away what a server may have left that would harm the one that accepts after it.

    What let_in() does; time-outs and linger, which accepted connections inherit; and how much TTL
    packets must have left, which keeps clients out, too.  Raises OSError.
    """
    for level, option in _least_ttl(listening):
        listening.setsockopt(level, option, 0)
    for option, value in _HARMLESS:
        listening.setsockopt(socket.SOL_SOCKET, option, value)
    let_in(listening)


def let_in(listening: socket.socket) -> None:
    """Take away what keeps clients out: a filter, a device that does not exist.

    Raises OSError where the filter is locked, or we may not change the device.
    """
    if device_of(listening) == NO_DEVICE:
        listening.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, 0)
    with suppress(FileNotFoundError):  # there is none
        listening.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _least_ttl(one: socket.socket) -> Sequence[tuple[int, int]]:
    """Return the options that say how much TTL packets must have left, for each protocol."""
    if one.family == socket.AF_INET6:  # which takes clients of IPv4, too
        return (socket.IPPROTO_IP, IP_MINTTL), (socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT)
    return ((socket.IPPROTO_IP, IP_MINTTL),) if one.family == socket.AF_INET else ()


def reapply_options(used: socket.socket, fresh: socket.socket) -> None:
    """Have a listening socket be as one would that is made and not bound yet.

    Raises OSError, with what is not to be had, where it cannot be: then part of it was done.
    """
    reset(used)
    if used.family == socket.AF_UNIX:
        return
    if used.family == socket.AF_INET6:
        only = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        if used.getsockopt(*only) != fresh.getsockopt(*only):
            raise OSError(errno.EINVAL, "v6only is told once and for all")
    if _locks(used) is None and any(used.getsockopt(*o) != fresh.getsockopt(*o) for o in _DOUBLED):
        raise OSError(errno.EOPNOTSUPP, "rcvbuf and sndbuf cannot be undone before Linux 5.14")
    _copy(fresh, used)


def _locks(one: socket.socket) -> int | None:
    try:
        return one.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
    except OSError:
        return None  # an older kernel


@frozen
class Mark:
    """What tells our own connections from all others; drawn anew for each generation."""

    source: str  # the address that they come from
    traffic_class: int = 0  # of IPv6

    @classmethod
    def draw(cls, family: int) -> Mark:
        """Draw one for connections of a family."""
        one, two, three = os.urandom(3)
        if family == socket.AF_INET6:
            return cls("::1", (1 + one % 63) << 2)  # of six bits
        return cls(f"127.{1 + one % 254}.{two}.{1 + three % 254}")

    @property
    def family(self) -> socket.AddressFamily:
        """Of its connections."""
        return socket.AF_INET6 if ":" in self.source else socket.AF_INET

    @property
    def options(self) -> tuple[tuple[int, int, int], ...]:
        """What a socket needs for it beside its source: levels, options and values."""
        # Where all ports are in use, one that is connected elsewhere can be had.
        late = socket.IPPROTO_IP, accept_marks.IP_BIND_ADDRESS_NO_PORT, 1
        if self.family == socket.AF_INET:
            return (late,)
        return (
            late,
            (socket.IPPROTO_IPV6, _IPV6_HOPS, _MOST_TTL),
            (socket.IPPROTO_IPV6, _IPV6_TRAFFIC_CLASS, self.traffic_class),
        )

    def put(self, one: socket.socket) -> None:
        """Have a socket connect with it.  Raises OSError."""
        for level, option, value in self.options:
            one.setsockopt(level, option, value)
        one.bind((self.source, 0))

    def _checks(self) -> Sequence[tuple[int, int, int]]:
        """Return what a packet with it has: how and from where to load it, and the value."""
        source = struct.unpack("!4I" if ":" in self.source else "!I", self._packed())
        if self.family == socket.AF_INET:
            return ((_LOAD_WORD, 12, source[0]),)
        words = ((_LOAD_WORD, 8 + 4 * at, word) for at, word in enumerate(source))
        return ((_LOAD_BYTE, 7, _MOST_TTL), *words)

    def _packed(self) -> bytes:
        return socket.inet_pton(self.family, self.source)

    def program(self, member: int) -> Sequence[tuple[int, int, int, int]]:
        """Return what selects a member for connections with it; for others what follows does."""
        of_ipv6 = self.family == socket.AF_INET6
        begins = 6 << 8 | self.traffic_class if of_ipv6 else 4 << 8
        # Version and traffic class are the first 12 bits; of IPv4 the length follows the version.
        kept = 0x0FF if of_ipv6 else 0
        found = [(_LOAD_HALF, 0, 0, _IP), (_SHIFT_RIGHT, 0, 0, 4), (_AND, 0, 0, 0xF00 | kept)]
        checks = [(load, _IP + at, value) for load, at, value in self._checks()]
        found.append((_IF_EQUAL, 0, 2 * len(checks) + 1, begins))
        for left, (load, at, value) in zip(reversed(range(len(checks))), checks, strict=True):
            found += [(load, 0, 0, at), (_IF_EQUAL, 0, 2 * left + 1, value)]
        return (*found, (_RETURN, 0, 0, member))


def comes_from(end: bytes | int, sources: Collection[str]) -> bool:
    """Whether a connection, as sock_diag.unaccepted() tells it, comes from one of these."""
    if isinstance(end, int):
        return False
    address = end[2:].removeprefix(bytes(10) + b"\xff\xff").ljust(16, b"\0")
    return address in [_packed(each).ljust(16, b"\0") for each in sources]


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def steer(one: socket.socket, member: int, marked: Mapping[Mark, int] = NO_MARKS) -> None:
    """Have clients that connect from now on come to one member of its group, counted from 0.

    marked: and connections with a mark to a member of their own.
    Members are in the order of listen(2), until one leaves: then the last one takes its position.
    Handshakes that are under way finish where they began.  Raises OSError.
    """
    program = [each for mark, its in marked.items() for each in mark.program(its)]
    _attach(one, _SO_ATTACH_REUSEPORT_CBPF, (*program, (_RETURN, 0, 0, member)))


def reserve(one: socket.socket, address: tuple[str, int]) -> socket.socket:
    """Return one that can join its group, to leave clients without an answer: silence().

    It is bound and does not listen.  Raises OSError, too where we may not bind the address.
    """
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made = _bind_beside(one, address)
    with suppress(OSError):  # since 2026 kernels want CAP_NET_ADMIN for that on a TCP socket
        _attach(made, _SO_ATTACH_FILTER, ((_RETURN, 0, 0, 0),))
    return made


def enlist(reserved: socket.socket, mark: int, backlog: int, beside: socket.socket | None) -> None:
    """Have a reserved socket listen for clients, for good.  Raises OSError.

    beside: a member of the group, which gets the clients until the next steer().
    """
    reset(reserved)
    _mark_if_can(reserved, mark)
    if beside is not None:
        beside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        steer_if_can(beside)
    reserved.listen(backlog)
    if beside is not None:
        steer(reserved, 0)


def silence(reserved: socket.socket) -> None:
    """Have it join its group as the last member; shutdown() ends that.  Raises OSError.

    It drops what clients begin with, so their kernels try again.  Source: IP_MINTTL in ip(7),
    tcp_v4_rcv() in tcp_ipv4.c; sk_acceptq_is_full() in sock.h for those that are let in by that.
    """
    for level, option in _least_ttl(reserved):
        reserved.setsockopt(level, option, _MOST_TTL)
    reserved.listen(0)


def refuse_new(listening: socket.socket) -> None:
    """Refuse new clients; those that have connected can still be accepted.  Raises OSError.

    One that is bound to a device is found only by clients that come by it.  Handshakes that
    are under way finish, for their device is the one of the socket when they began.  A filter
    would do as well; but since 2026 kernels want CAP_NET_ADMIN for one on a TCP socket.
    """
    if device_of(listening) == NO_DEVICE:
        return
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, NO_DEVICE)
    except OSError:
        # It has a device already, or the kernel is older than 5.7, which asks for CAP_NET_RAW.
        _attach(listening, _SO_ATTACH_FILTER, _NO_NEW_CLIENTS)


def _attach(to: socket.socket, option: int, program: Sequence[tuple[int, int, int, int]]) -> None:
    try:
        import array  # not at the top: most protectors steer nothing, and it takes 70 KB
    except ImportError as error:
        raise OSError(errno.ENOMEM, f"cannot load array: {error}") from error
    code = array.array("B", b"".join(_INSTRUCTION.pack(*each) for each in program))
    address, _ = code.buffer_info()
    to.setsockopt(socket.SOL_SOCKET, option, _PROGRAM.pack(len(program), address))


def _mark_if_can(one: socket.socket, mark: int) -> None:
    with suppress(OSError):  # then its connections are not counted
        accept_marks.mark(one, mark)


def _copy(first: socket.socket, second: socket.socket) -> None:
    """Set the options of one as another has them.  Raises OSError where we may not."""
    options = _COPIED + (_OF_IPV6 if first.family == socket.AF_INET6 else ())
    for level, option in options:
        value = first.getsockopt(level, option)
        if value != second.getsockopt(level, option):
            doubled = (level, option) in _DOUBLED
            second.setsockopt(level, option, value // 2 if doubled else value)
    locks = _locks(first)
    if locks is not None and locks != _locks(second):
        second.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, locks)
    for level, option in _TEXTS:
        text = first.getsockopt(level, option, _NAME_BYTES)
        if text != second.getsockopt(level, option, _NAME_BYTES):
            second.setsockopt(level, option, text)
