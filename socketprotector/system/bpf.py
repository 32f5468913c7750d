"""Classic BPF programs for sockets: filters of packets, and programs that select group members.

A mark distinguishes our probe connections (daemon/ready_probe.py) from clients.
An IPv4 mark is a random source address of 127/8, which no packet from a network may have.
IPv6 has only one loopback address, so its mark is a random traffic class and the highest hop limit.
No system uses that limit by default.  Both values are in the fixed part of the IP header.

A share of the other connections may go to another group member: for each, the kernel draws a
random number.

Source: SO_ATTACH_FILTER and SO_ATTACH_REUSEPORT_CBPF in socket(7); SKF_NET_OFF and
SKF_AD_RANDOM in linux/filter.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Mapping, Sequence

from ..model.lazy_dataclass import frozen
from ..model.share import WHOLE
from . import accept_tags, scoped

#: One instruction: code, jump distance if true, jump distance if false, value.
Instruction = tuple[int, int, int, int]

SO_ATTACH_FILTER = 26
SO_ATTACH_REUSEPORT_CBPF = 51
_INSTRUCTION = struct.Struct("HBBI")
_PROGRAM = struct.Struct("HP")
_RETURN = 0x06
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_AND, _SHIFT_RIGHT, _MODULO, _IF_EQUAL, _IF_AT_LEAST = 0x54, 0x74, 0x94, 0x15, 0x35
#: The offset of the IP header (SKF_NET_OFF).
_IP = 0x1_0000_0000 - 0x10_0000
#: The offset of a random number (SKF_AD_OFF + SKF_AD_RANDOM), drawn at each load.
_RANDOM = 0x1_0000_0000 - 0x1000 + 56
_IPV6_TRAFFIC_CLASS, _IPV6_HOPS = 67, 16
#: The highest TTL of a packet; nearly all systems start with 64 or 128.
MOST_TTL = 255

#: Drops segments with SYN and without ACK, and passes all others.  So no new client connects, but
#: handshakes that are under way finish.
NO_NEW_CLIENTS: Sequence[Instruction] = (
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (_RETURN, 0, 0, 0),  # drop
    (_RETURN, 0, 0, 0xFFFFFFFF),  # pass
)


@frozen
class Mark:
    """The origin by which a filter recognises our own connections; new for each generation."""

    source: str  # the source address of these connections
    traffic_class: int = 0  # for IPv6

    @classmethod
    def draw(cls, host: str) -> Mark:
        """Return a random mark for connections to a host of this machine."""
        first, second, third = os.urandom(3)
        if ":" in host:
            return cls(source_of_ipv6(host), (1 + first % 63) << 2)  # six bits
        return cls(f"127.{1 + first % 254}.{second}.{1 + third % 254}")

    @property
    def family(self) -> socket.AddressFamily:
        """The address family of connections with this mark."""
        return socket.AF_INET6 if ":" in self.source else socket.AF_INET

    @property
    def options(self) -> tuple[tuple[int, int, int], ...]:
        """The mark's socket options, without its source address: levels, options and values."""
        # Let connect() choose the port.  Even if all ports are in use, it may share a port that is
        # connected to another address.
        late = socket.IPPROTO_IP, accept_tags.IP_BIND_ADDRESS_NO_PORT, 1
        if self.family == socket.AF_INET:
            return (late,)
        return (
            late,
            (socket.IPPROTO_IPV6, _IPV6_HOPS, MOST_TTL),
            (socket.IPPROTO_IPV6, _IPV6_TRAFFIC_CLASS, self.traffic_class),
        )

    def put(self, sock: socket.socket) -> None:
        """Make a socket connect with this mark.  Raises OSError."""
        for level, option, value in self.options:
            sock.setsockopt(level, option, value)
        sock.bind(scoped.sockaddr(self.source, 0))

    def _checks(self) -> Sequence[tuple[int, int, int]]:
        """Return the checks for a packet with this mark: load instruction, offset, and value."""
        source = struct.unpack("!4I" if ":" in self.source else "!I", _packed(self.source))
        if self.family == socket.AF_INET:
            return ((_LOAD_WORD, 12, source[0]),)
        words = ((_LOAD_WORD, 8 + 4 * at, word) for at, word in enumerate(source))
        return ((_LOAD_BYTE, 7, MOST_TTL), *words)

    def program(self, member: int) -> Sequence[Instruction]:
        """Return instructions that select a member for connections with this mark.

        For other connections, the instructions that follow decide.
        """
        of_ipv6 = self.family == socket.AF_INET6
        begins = 6 << 8 | self.traffic_class if of_ipv6 else 4 << 8
        # The first 12 bits are IPv6's version and traffic class, or IPv4's version, length and TOS.
        kept = 0x0FF if of_ipv6 else 0
        found = [(_LOAD_HALF, 0, 0, _IP), (_SHIFT_RIGHT, 0, 0, 4), (_AND, 0, 0, 0xF00 | kept)]
        checks = [(load, _IP + at, value) for load, at, value in self._checks()]
        found.append((_IF_EQUAL, 0, 2 * len(checks) + 1, begins))
        for following, (load, at, value) in zip(reversed(range(len(checks))), checks, strict=True):
            found += [(load, 0, 0, at), (_IF_EQUAL, 0, 2 * following + 1, value)]
        return (*found, (_RETURN, 0, 0, member))


def source_of_ipv6(host: str) -> str:
    """Return the source address of our IPv6 connections to a host; local clients may have it, too.

    A socket of a link-local address has no route to ::1, so its own address is the source.
    """
    return host if "%" in host else "::1"


def comes_from(end: bytes | int, sources: Collection[str]) -> bool:
    """Return True if a connection from sock_diag.unaccepted() has one of these source addresses."""
    if isinstance(end, int):
        return False
    address = end[2:].removeprefix(bytes(10) + b"\xff\xff").ljust(16, b"\0")
    return address in [_packed(each).ljust(16, b"\0") for each in sources]


def _packed(address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_pton(family, address.partition("%")[0])


def selecting(
    member: int, marked: Mapping[Mark, int], drawn: int = 0, share: int = 0
) -> Sequence[Instruction]:
    """Return a program that selects the group member that gets a connection.

    member: for connections without a mark.  marked: the member for connections with each mark.
    drawn: the member that gets `share` parts of WHOLE of the connections without a mark.
    """
    by_mark = [each for mark, target in marked.items() for each in mark.program(target)]
    draw: Sequence[Instruction] = (
        (_LOAD_WORD, 0, 0, _RANDOM),
        (_MODULO, 0, 0, WHOLE),
        (_IF_AT_LEAST, 1, 0, share),
        (_RETURN, 0, 0, drawn),
    )
    return (*by_mark, *(draw if share else ()), (_RETURN, 0, 0, member))


def attach(to: socket.socket, option: int, program: Sequence[Instruction]) -> None:
    """Attach a program to a socket or to its group, with this option.  Raises OSError."""
    try:
        import array  # not at the top: it costs 70 KB, and most protectors attach no program
    except ImportError as error:
        raise OSError(errno.ENOMEM, f"cannot load array: {error}") from error
    code = array.array("B", b"".join(_INSTRUCTION.pack(*each) for each in program))
    address, _ = code.buffer_info()
    to.setsockopt(socket.SOL_SOCKET, option, _PROGRAM.pack(len(program), address))
