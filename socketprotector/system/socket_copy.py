"""The options of a listening socket: copied to a socket bound beside it, or reset.

What workers set, and what is put back for the next generation: socket_snapshot.py.

Source: socket(7), ip(7), ipv6(7), tcp(7).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from contextlib import suppress

from .cleanup import on_error

_SO_DETACH_FILTER = 27
_SO_BINDTOIFINDEX = 62
#: Which of a socket's buffers have a size that was asked for, and so are not adapted (since 5.14).
_SO_BUF_LOCK = 72
#: No network device ever has this number.
NO_DEVICE = 0x7FFFFFFF
#: Of linux/in.h and linux/in6.h; the socket module has no names for them.
IP_FREEBIND = 15
IP_MINTTL = 21
IPV6_MINHOPCOUNT = 73
IPV6_TRANSPARENT = 75

#: What accepted connections inherit, or what the address is bound with.
_COPIED = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    # Also beside a socket that was shut down: it holds the port while a worker has it.
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
#: What the kernel begins with: no time-outs, no linger, and one byte is enough to tell of.
_HARMLESS = (
    (socket.SO_RCVTIMEO, bytes(16)),
    (socket.SO_SNDTIMEO, bytes(16)),
    (socket.SO_LINGER, bytes(8)),
    (socket.SO_RCVLOWAT, 1),
)


def bind_beside(one: socket.socket, address: tuple[str, int]) -> socket.socket:
    """Return a socket bound to an address, with the options of `one`.  Raises OSError."""
    made = socket.socket(one.family, socket.SOCK_STREAM)
    with on_error(made.close):
        copy(one, made)
        made.bind(address)
    return made


def reset(listening: socket.socket) -> None:
    """Reset options of an earlier server that would harm the next server on this socket.

    What let_in() does; time-outs and linger, which accepted connections inherit; and how much TTL
    packets must have left, which keeps clients out, too.  Raises OSError.
    """
    for level, option in least_ttl(listening):
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


def least_ttl(one: socket.socket) -> Sequence[tuple[int, int]]:
    """Return the options that say how much TTL packets must have left, for each protocol."""
    if one.family == socket.AF_INET6:  # which takes clients of IPv4, too
        return (socket.IPPROTO_IP, IP_MINTTL), (socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT)
    return ((socket.IPPROTO_IP, IP_MINTTL),) if one.family == socket.AF_INET else ()


def reapply_options(used: socket.socket, fresh: socket.socket) -> None:
    """Give a listening socket the options of a fresh socket.

    Raises OSError, naming the option that cannot be set: some options are set by then.
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
    copy(fresh, used)


def _locks(one: socket.socket) -> int | None:
    try:
        return one.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
    except OSError:
        return None  # an older kernel


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


def leave_devices(listening: socket.socket) -> None:
    """Bind it to a device that does not exist, so that no client finds it.  Raises OSError."""
    if device_of(listening) == NO_DEVICE:
        return
    listening.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, NO_DEVICE)


def copy(first: socket.socket, second: socket.socket) -> None:
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
