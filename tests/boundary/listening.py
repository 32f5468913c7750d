"""Listening sockets of all kinds, for tests."""

from __future__ import annotations

import socket
import struct

import pytest

from tests import needs

#: Family, the address to bind, whether it takes both, and the addresses to connect to.
KINDS = [
    pytest.param(socket.AF_INET, "127.0.0.1", False, ("127.0.0.1",), id="ipv4"),
    pytest.param(socket.AF_INET, "0.0.0.0", False, ("127.0.0.1", "127.0.0.2"), id="any ipv4"),
    pytest.param(socket.AF_INET6, "::1", False, ("::1",), id="ipv6"),
    pytest.param(socket.AF_INET6, "::", True, ("::1", "127.0.0.1"), id="both"),
]


def listening(family: int, host: str, *, both: bool = False, **options: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
    for name, value in options.items():
        made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    made.setblocking(False)
    made.bind((host, 0))
    made.listen(40)
    return made


def ignore_clients(one: socket.socket) -> None:
    """Set a key that loopback's clients would have to sign with, by TCP_MD5SIG_EXT.

    It takes no privilege.  (Of a key for all addresses, socket_copy.reset() clears the socket.)
    """
    who = struct.pack("H", one.family).ljust(128, b"\0")
    try:
        one.setsockopt(socket.IPPROTO_TCP, 32, who + struct.pack("BBHi80s", 1, 1, 3, 0, b"key"))
    except OSError as error:
        needs.skip("TCP_MD5SIG", error)
