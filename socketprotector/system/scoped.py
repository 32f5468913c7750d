"""Hosts as text, and as bind() and connect() take them: `fe80::1%eth0` names its interface.

A link-local IPv6 address exists on each link.  So bind() and connect() need the interface, which
getsockname() reports.  bind() then also binds the socket to the interface, as SO_BINDTODEVICE does.

Source: ipv6(7); inet6_bind() in net/ipv6/af_inet6.c; RFC 4007, section 11.
"""

from __future__ import annotations

import errno
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: An address as the socket module has it.
SocketAddress = tuple[str, int] | tuple[str, int, int, int]


def sockaddr(host: str, port: int) -> SocketAddress:
    """Return an address as bind() and connect() take it.  Raises OSError: no such interface."""
    bare, _, interface = host.partition("%")
    if not interface:
        return host, port
    try:
        return bare, port, 0, socket.if_nametoindex(interface)
    except OSError:  # without an errno
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), interface) from None


def host_of(address: Any) -> str:
    """Return the host of an address from the socket module, with the interface if it is needed."""
    host = str(address[0])
    if len(address) < 4 or not address[3]:
        return host
    is_link_local = int(host.partition(":")[0] or "0", 16) & 0xFFC0 == 0xFE80
    flags = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    return socket.getnameinfo(address, flags)[0] if is_link_local else host


def without_interface(address: str) -> str:
    """Return an address such as `[fe80::1%eth0]:80` as /proc shows it: `[fe80::1]:80`."""
    host, percent, rest = address.partition("%")
    return host + rest[rest.rfind("]") :] if percent else address
