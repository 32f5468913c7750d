"""Parses listen addresses, converts them to the protector's names, and binds them.

Without a protector a worker binds and listens itself.  An address means the same here as on the
protector's command line.

Rule: this module knows nothing of channels and workers.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections import namedtuple

from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Optional, Sequence, Tuple, Union

    #: 4321, "4321", "host:4321", "[::1]:4321", "unix:/path", ("host", 4321).
    OneAddress = Union[int, str, Tuple[str, int]]
    #: One address, or a list of addresses.
    ListenAddress = Union[OneAddress, Sequence[OneAddress]]

# How many ports to try: a port that is free for IPv4 may be taken for IPv6.
_PORT_TRIES = 20


class Endpoint(namedtuple("Endpoint", ("family", "address"))):
    """One place to bind: the address family, and the address as bind() takes it."""

    __slots__ = ()


def resolve(address: ListenAddress) -> list[list[Endpoint]]:
    """Return the endpoints of each address, in order.

    A port alone means every address of this machine: 0.0.0.0, then [::].
    Raises ValueError for a malformed address, socket.gaierror for an unknown host.
    """
    if isinstance(address, (int, str)):
        return [_resolve_one(address)]
    if isinstance(address, tuple) and len(address) == 2:
        host, port = address
        # A tuple of two addresses is not a (host, port) pair.
        if isinstance(host, str) and isinstance(port, int):
            return [_resolve_one(f"[{host}]:{port}")]
    return [endpoints for one in address for endpoints in resolve(one)]


def _resolve_one(address: OneAddress) -> list[Endpoint]:
    text = str(address)
    if text.startswith("unix:"):
        path = text[len("unix:") :]
        if not path:
            raise ValueError(f"cannot listen on {text!r}: it names no path")
        return [Endpoint(socket.AF_UNIX, "\0" + path[1:] if path[0] == "@" else path)]
    if text.startswith("tcp:"):
        text = text[len("tcp:") :]
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(
            f"cannot listen on {address!r}: expected PORT, HOST:PORT, [HOST6]:PORT or unix:PATH"
        )
    host = host[1:-1] if host.startswith("[") else host
    if not host:
        everywhere = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))
        return [Endpoint(family, (any_host, int(port))) for family, any_host in everywhere]
    # Pass bytes: to encode a str, even an ASCII one, Python loads `re` and tables of Unicode.
    name = host.encode() if host.isascii() else host
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        why = f"cannot listen on {address!r}: {error.strerror}"
        raise socket.gaierror(error.errno, why) from error
    return [Endpoint(family, sockaddr) for family, _, _, _, sockaddr in dict.fromkeys(found)]


def listen(address: Optional[ListenAddress], backlog: int) -> list[socket.socket]:
    """Bind and listen on every endpoint of address; return the sockets, non-blocking.

    The caller owns the sockets.  A stale UNIX socket is replaced; a live one is not.
    Raises ValueError for None, and the errors of `resolve`.  Raises OSError if an endpoint cannot
    be bound; then no endpoint stays bound.
    """
    if address is None:
        raise ValueError(
            "cannot tell where to listen: there is no protector and no address was given"
        )
    sockets: list[socket.socket] = []
    try:
        for endpoints in resolve(address):
            sockets += _listen_together(endpoints, backlog)
    except BaseException:
        close_all(sockets)
        raise
    return sockets


def _listen_together(
    endpoints: Sequence[Endpoint], backlog: int, tries_left: int = _PORT_TRIES
) -> list[socket.socket]:
    """Listen on the endpoints of an address; for port 0, all endpoints get the same free port."""
    sockets: list[socket.socket] = []
    try:
        for family, address in endpoints:
            if (
                sockets and not address[1]
            ):  # never a UNIX socket, which is an address's only endpoint
                address = (address[0], sockets[-1].getsockname()[1], *address[2:])
            try:
                sockets.append(_listen_on(family, address, backlog))
            except OSError as error:
                # No IPv6 on this machine: the earlier addresses suffice.
                if not sockets or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
    except OSError as error:
        close_all(sockets)
        port_was_chosen = sockets and not endpoints[0].address[1]
        if error.errno != errno.EADDRINUSE or not port_was_chosen or not tries_left:
            raise
        return _listen_together(endpoints, backlog, tries_left - 1)
    return sockets


def _listen_on(family: int, address: Any, backlog: int) -> socket.socket:
    listener = Socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            _remove_if_stale(address)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        # Without errno: the path of a UNIX socket is too long.
        reason = os.strerror(error.errno) if error.errno else error
        where = name_of(family, address)
        raise OSError(error.errno, f"cannot listen on {where}: {reason}") from error
    return listener


def _remove_if_stale(path: str) -> None:
    # connect() fails with the same error for a regular file as for a stale socket.
    if path.startswith("\0") or not (os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode)):
        return
    with Socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Non-blocking: a socket with a full backlog is alive, and connect() must not wait for it.
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


class OwnPaths:
    """The paths of UNIX sockets that this process has bound.  Make it right after bind()."""

    def __init__(self, listeners: Iterable[socket.socket]) -> None:
        names = [one.getsockname() for one in listeners if one.family == socket.AF_UNIX]
        names = [name for name in names if isinstance(name, str) and name]  # abstract: bytes
        # Absolute, because the program may change its directory.  Not abspath(), which would remove
        # `..` without following links.
        paths = [name if name[0] == "/" else f"{os.getcwd()}/{name}" for name in names]
        self._files = [(path, _file_at(path)) for path in paths]

    def remove(self) -> None:
        """Remove the paths, except those that another program has bound since.

        Call this before closing the sockets.  Afterwards another program may bind a path, and the
        new file may get the same inode number.
        """
        while self._files:  # only once: later the inode may be another file's
            path, file = self._files.pop()
            if file is not None and _file_at(path) == file:
                try:
                    os.unlink(path)
                except OSError:
                    pass  # the file was removed just now, or we may no longer remove it


def _file_at(path: str) -> Optional[Tuple[int, int]]:
    """Return the device and inode number of the file at the path; None if there is no file."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def close_all(listeners: Sequence[socket.socket]) -> None:
    """Close listening sockets that were just bound, and remove the paths of UNIX sockets."""
    OwnPaths(listeners).remove()
    for listener in listeners:
        listener.close()


def name_of(family: int, address: Any) -> str:
    """Return the name of a listen address as the protector writes it: `tcp:[::1]:4321`."""
    if family == socket.AF_UNIX:
        # getsockname() returns an abstract name as bytes.
        path = os.fsdecode(address)
        return f"unix:@{path[1:]}" if path.startswith("\0") else f"unix:{path}"
    host, port = address[:2]
    if len(address) > 3 and address[3]:  # a link-local address, with its interface
        host, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return f"tcp:[{host}]:{port}" if family == socket.AF_INET6 else f"tcp:{host}:{port}"


def family_of(name: str) -> Optional[int]:
    """Return the address family of a listener's name; None if the name has no family."""
    if name.startswith("unix:"):
        return socket.AF_UNIX
    if name.startswith("tcp:["):
        return socket.AF_INET6
    return socket.AF_INET if name.startswith("tcp:") else None


def sockname_of(name: str) -> Any:
    """Return the getsockname() of the listener with this name."""
    if name.startswith("unix:"):
        path = name[len("unix:") :]
        return b"\0" + os.fsencode(path[1:]) if path.startswith("@") else path
    host, _, port = name[len("tcp:") :].rpartition(":")
    if not port.isdecimal():
        return ("0.0.0.0", 0)
    if not host.startswith("["):
        return host, int(port)
    host, _, interface = host[1:-1].partition("%")
    try:
        index = socket.if_nametoindex(interface) if interface else 0
    except OSError:  # the interface is gone, or of another network namespace
        # For an interface without a name, getnameinfo() writes the number.
        index = int(interface) if interface.isdecimal() else 0
    return host, int(port), 0, index
