"""The options of a listening socket: copied to a socket bound beside it, or reset.

socket_snapshot.py restores the options that workers change.

Source: socket(7), ip(7), ipv6(7), tcp(7).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

from .cleanup import on_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .scoped import SocketAddress

_SO_DETACH_FILTER = 27
_SO_BINDTOIFINDEX = 62
#: Option: which buffers have a fixed size, which the kernel does not adapt (since 5.14).
_SO_BUF_LOCK = 72
#: No network device ever has this number.
NO_DEVICE = 0x7FFFFFFF
#: Constants of linux/in.h and linux/in6.h that the socket module lacks.
IP_FREEBIND = 15
IP_MINTTL = 21
IPV6_MINHOPCOUNT = 73
IPV6_TRANSPARENT = 75

#: The option that demands a signature by a key (RFC 2385), here from a range of addresses.
_TCP_MD5SIG_EXT, _HAS_PREFIX = 32, 1
#: Address, flags, length of the address's prefix, length of the key, interface, and key.
_SIGNATURE = struct.Struct("=128sBBHi80s")
_ANY_IPV4 = struct.pack("=H", socket.AF_INET)
_ANY_IPV6 = struct.pack("=H", socket.AF_INET6)
#: IPv4 clients of an IPv6 socket.
_ANY_MAPPED = struct.pack("=H6x16s", socket.AF_INET6, bytes(10) + b"\xff\xff")

#: Options that accepted connections inherit, or that binding the address needs.
_COPIED = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    # Needed even beside a socket that was shut down: it keeps the port while a worker has it.
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
    (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
    (socket.IPPROTO_IPV6, IPV6_TRANSPARENT),
)
#: For these the kernel doubles the set value, and returns the doubled value.
_DOUBLED = ((socket.SOL_SOCKET, socket.SO_RCVBUF), (socket.SOL_SOCKET, socket.SO_SNDBUF))
_TEXTS = (
    (socket.SOL_SOCKET, socket.SO_BINDTODEVICE),
    (socket.IPPROTO_TCP, socket.TCP_CONGESTION),
)
_NAME_BYTES = 16
#: The kernel's initial values: no timeouts, no linger, and readable from one byte on.
_HARMLESS = (
    (socket.SO_RCVTIMEO, bytes(16)),
    (socket.SO_SNDTIMEO, bytes(16)),
    (socket.SO_LINGER, bytes(8)),
    (socket.SO_RCVLOWAT, 1),
)


def bind_beside(sock: socket.socket, address: SocketAddress) -> socket.socket:
    """Return a socket bound to an address, with the options of `sock`.  Raises OSError."""
    made = socket.socket(sock.family, socket.SOCK_STREAM)
    with on_error(made.close):
        copy(sock, made, device=not any(address[2:]))  # a link-local address sets the device
        made.bind(address)
    return made


def reset(listening: socket.socket) -> None:
    """Reset options of an earlier server that would harm the next server on this socket.

    They are the options that let_in() removes; timeouts and linger, which accepted connections
    inherit; and what silence() of reuseport.py sets.  Raises OSError.
    """
    for level, option in least_ttl(listening):
        listening.setsockopt(level, option, 0)
    with suppress(OSError):  # no signature is demanded
        demand_signature(listening, b"")
    for option, value in _HARMLESS:
        listening.setsockopt(socket.SOL_SOCKET, option, value)
    let_in(listening)


def let_in(listening: socket.socket) -> None:
    """Remove the filter, or the missing device, that keeps clients out.

    Raises OSError if the filter is locked, or the device may not be changed.
    """
    if has_left_devices(listening):
        listening.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, 0)
    with suppress(FileNotFoundError):  # there is no filter
        listening.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def least_ttl(sock: socket.socket) -> Sequence[tuple[int, int]]:
    """Return the options for the least TTL of packets, for each protocol of the socket."""
    if sock.family == socket.AF_INET6:  # such a socket may get IPv4 clients, too
        return (socket.IPPROTO_IP, IP_MINTTL), (socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT)
    return ((socket.IPPROTO_IP, IP_MINTTL),) if sock.family == socket.AF_INET else ()


def demand_signature(sock: socket.socket, key: bytes) -> None:
    """Drop all packets that lack a signature by this key; b"": undo that, or raise OSError.

    Unlike a filter, this needs no privilege.  Raises OSError where the kernel lacks TCP_MD5SIG.
    Source: tcp(7); tcp_v4_parse_md5_keys() in tcp_ipv4.c (for a range of addresses, since 4.13).
    """
    both = (_ANY_IPV6, _ANY_MAPPED)
    for clients in (_ANY_IPV4,) if sock.family == socket.AF_INET else both:
        value = _SIGNATURE.pack(clients, _HAS_PREFIX, 0, len(key), 0, key)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_MD5SIG_EXT, value)


def reapply_options(used: socket.socket, fresh: socket.socket, *, device: bool = True) -> None:
    """Give a listening socket the options of a fresh socket; device: also its device.

    Raises OSError, which names the option that cannot be set; earlier options stay set.
    """
    reset(used)
    if used.family == socket.AF_UNIX:
        return
    if used.family == socket.AF_INET6:
        only = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        if used.getsockopt(*only) != fresh.getsockopt(*only):
            raise OSError(errno.EINVAL, "v6only cannot be changed after the bind")
    if _locks(used) is None and any(used.getsockopt(*o) != fresh.getsockopt(*o) for o in _DOUBLED):
        raise OSError(errno.EOPNOTSUPP, "rcvbuf and sndbuf cannot be undone before Linux 5.14")
    copy(fresh, used, device=device)


def _locks(sock: socket.socket) -> int | None:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
    except OSError:
        return None  # an older kernel


def device_of(listening: socket.socket) -> int:
    """Return the index of the device that a socket is bound to, 0 for none.  Raises OSError."""
    return listening.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)


def device_is_gone(listening: socket.socket) -> bool:
    """Return whether a socket is bound to a missing device, and so gets no client."""
    try:
        listening.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _NAME_BYTES)
    except OSError as error:
        return error.errno == errno.ENODEV
    return False


def interface_is_gone(listening: socket.socket) -> bool:
    """Return whether a socket's interface was removed; False after leave_devices()."""
    return device_is_gone(listening) and not has_left_devices(listening)


def leave_devices(listening: socket.socket) -> None:
    """Bind a socket to a device that does not exist, so that no client reaches it.

    Raises OSError.
    """
    if not has_left_devices(listening):
        listening.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, NO_DEVICE)


def has_left_devices(listening: socket.socket) -> bool:
    """Return whether leave_devices() was called for a socket."""
    try:
        return device_of(listening) == NO_DEVICE
    except OSError:
        return False  # a kernel older than 5.0 lacks the option


def copy(first: socket.socket, second: socket.socket, *, device: bool = True) -> None:
    """Copy the options of the first socket to the second.  Raises OSError without permission.

    device: also copy the device, which needs CAP_NET_RAW before Linux 5.7.
    """
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
        if option == socket.SO_BINDTODEVICE and level == socket.SOL_SOCKET and not device:
            continue
        text = first.getsockopt(level, option, _NAME_BYTES)
        if text != second.getsockopt(level, option, _NAME_BYTES):
            second.setsockopt(level, option, text)
