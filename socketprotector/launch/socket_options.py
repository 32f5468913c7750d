"""Checks the options after a TCP listener's `?`, and sets them before the bind.

Accepted connections inherit all options except the priority, which is set on each connection.
system/socket_copy.py has the options that are copied to further sockets of the address.
system/socket_snapshot.py has the options that are restored after a worker has changed them.

Source: socket(7), ip(7), ipv6(7), tcp(7); sk_clone_lock() in net/core/sock.c.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping

from ..model.errors import UsageError
from ..model.lazy_dataclass import frozen
from ..system.socket_copy import IP_FREEBIND, IPV6_TRANSPARENT
from .option_values import TIME

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,12}|[0-9]{1,12}")
_TIME = re.compile(r"[0-9a-z.]+")
_KEEPALIVE = re.compile(r"([0-9]{0,5})(?::([0-9]{0,5}))?(?::([0-9]{0,5}))?")
_KEEP = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
#: The errno values of a missing permission.
FORBIDDEN = (errno.EPERM, errno.EACCES)

_Set = Callable[[socket.socket, str], None]


@frozen
class Option:
    """An option: its allowed values, in words and as a test, and a function that sets it."""

    allowed: str
    is_allowed: Callable[[str], bool]
    put: _Set


def number(value: str) -> int:
    """Return a decimal number, or a hexadecimal number after 0x; -1 if the text is no number."""
    return int(value, 16 if value[:2] in ("0x", "0X") else 10) if _NUMBER.fullmatch(value) else -1


def _between(least: int, most: int) -> Callable[[str], bool]:
    return lambda value: least <= number(value) <= most


def _ms(value: str) -> int:
    """Return a time in whole milliseconds; 0 if the text is no time."""
    try:
        return round(TIME.read(value) * 1000) if _TIME.fullmatch(value) else 0
    except ValueError:
        return 0


def _is_keepalive(value: str) -> bool:
    # 32,767 s is the kernel's limit of IDLE and INTERVAL (net/tcp.h).  The bind reports a COUNT
    # that is too large.
    found = _KEEPALIVE.fullmatch(value)
    return found is not None and all(0 < int(each) <= 32_767 for each in found.groups() if each)


def _put_keepalive(sock: socket.socket, value: str) -> None:
    found = _KEEPALIVE.fullmatch(value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in zip(_KEEP, found.groups() if found else (), strict=False):
        if seconds:
            sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds))


def _of_ip(option: int, of_ipv6: int) -> _Set:
    """Return a setter of an IP option.

    An IPv6 socket gets both options, because IPv4 clients may use the socket, too.
    """

    def put(sock: socket.socket, value: str) -> None:
        sock.setsockopt(socket.IPPROTO_IP, option, number(value))
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, of_ipv6, number(value))

    return put


def _put_v6only(sock: socket.socket, value: str) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(value))


def _put(level: int, option: int, value_of: Callable[[str], int | bytes] = number) -> _Set:
    return lambda sock, value: sock.setsockopt(level, option, value_of(value))


def _elsewhere(sock: socket.socket, value: str) -> None:
    """Do nothing: the option takes effect at listen(2) or accept(2)."""


_SWITCH = ("0 or 1", lambda value: value in ("0", "1"))
_ABOVE_0 = ("a whole number above 0", _between(1, 2**31 - 1))
_SOCKET, _TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP

OPTIONS: Mapping[str, Option] = {
    "backlog": Option(*_ABOVE_0, _elsewhere),
    "congestion": Option(
        "the name of an algorithm, like cubic",
        lambda value: 0 < len(value) < 16,
        _put(_TCP, socket.TCP_CONGESTION, os.fsencode),
    ),
    "defer_accept": Option(*_ABOVE_0, _put(_TCP, socket.TCP_DEFER_ACCEPT)),
    "device": Option("a name, like eth0", bool, _put(_SOCKET, socket.SO_BINDTODEVICE, os.fsencode)),
    "fastopen": Option(*_ABOVE_0, _put(_TCP, socket.TCP_FASTOPEN)),
    "freebind": Option(*_SWITCH, _put(socket.IPPROTO_IP, IP_FREEBIND)),
    "keepalive": Option(
        "IDLE:INTERVAL:COUNT, the times in seconds; each may be empty",
        _is_keepalive,
        _put_keepalive,
    ),
    "mark": Option(
        "a number from 0 to 0xffffffff",
        _between(0, 2**32 - 1),
        # As bytes, because the numbers of Python's setsockopt() are signed.
        _put(_SOCKET, socket.SO_MARK, lambda v: number(v).to_bytes(4, sys.byteorder)),
    ),
    "nodelay": Option(*_SWITCH, _put(_TCP, socket.TCP_NODELAY)),
    "nonblock": Option(*_SWITCH, _elsewhere),
    "priority": Option("a number from 0 to 15", _between(0, 15), _elsewhere),
    "rcvbuf": Option(*_ABOVE_0, _put(_SOCKET, socket.SO_RCVBUF)),
    "sndbuf": Option(*_ABOVE_0, _put(_SOCKET, socket.SO_SNDBUF)),
    "tos": Option(
        "a number from 0 to 255, like 0x10",
        _between(0, 255),
        _of_ip(socket.IP_TOS, socket.IPV6_TCLASS),
    ),
    "transparent": Option(*_SWITCH, _of_ip(socket.IP_TRANSPARENT, IPV6_TRANSPARENT)),
    "user_timeout": Option(
        "a time from 1ms to 24d, like 500ms, 30s or 1h30m",
        lambda value: 0 < _ms(value) < 2**31,
        _put(_TCP, socket.TCP_USER_TIMEOUT, _ms),
    ),
    "v6only": Option(*_SWITCH, _put_v6only),
}
#: The capability that an option needs, for the error message.
_NEEDS = {
    "mark": "CAP_NET_ADMIN",
    "transparent": "CAP_NET_ADMIN",
    "device": "CAP_NET_RAW on a kernel before 5.7",
}


def check(text: str, name: str, value: str) -> None:
    """Raise UsageError if an option cannot have this value.  text: the LISTEN argument."""
    if not OPTIONS[name].is_allowed(value):
        raise UsageError(f"{text}: {name} must be {OPTIONS[name].allowed}")


class Unsettable(OSError):
    """The system refuses an option; `hint` says what to do."""

    def __init__(self, name: str, value: str, error: OSError) -> None:
        super().__init__(error.errno, f"{name}={value}: {error.strerror}")
        self.hint = "see the manual page tcp(7), or ip(7), for this option and its values"
        if error.errno in FORBIDDEN and name in _NEEDS:
            self.hint = f"it needs {_NEEDS[name]}: start as root with --user, or leave it out"
        elif name == "congestion" and error.errno == errno.ENOENT:
            self.hint = "see the sysctl net.ipv4.tcp_available_congestion_control"
        elif name == "congestion" and error.errno in FORBIDDEN:
            self.hint = "see the sysctl net.ipv4.tcp_allowed_congestion_control"
        elif name == "device":
            self.hint = "see `ip link` for the devices there are"


def put(sock: socket.socket, options: Mapping[str, str]) -> None:
    """Set these options on a socket that is not bound yet.  Raises Unsettable."""
    for name, value in {"v6only": "1", **options}.items():
        try:
            OPTIONS[name].put(sock, value)
        except OSError as error:
            raise Unsettable(name, value, error) from error
