"""Makes the environment of a program: with the client's address, without our own variables.

Source: tcp-environ(5) of ucspi-tcp and its IPv6 variant, the protocol of ucspi-unix,
systemd.exec(5) ($REMOTE_ADDR).
"""

from __future__ import annotations

import _socket as socket
import os
import struct

#: Variables of the pool itself, and variables that describe another connection.
_NOT_PASSED_ON = (
    *(b"SOCKETPROTECTOR_", b"NOTIFY_SOCKET", b"WATCHDOG_", b"LISTEN_", b"FDSTORE"),
    *(b"TCPLOCAL", b"TCPREMOTE", b"TCP6", b"UNIXLOCAL", b"UNIXREMOTE", b"REMOTE_", b"PROTO="),
)
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_MAPPED = "::ffff:"

TYPE_CHECKING = False
if TYPE_CHECKING:
    Address = tuple[str, int] | tuple[str, int, int, int]


class Environments:
    """Makes the environment of each program."""

    def __init__(self, environ: dict[bytes, bytes], listeners: str) -> None:
        """listeners: the value of SOCKETPROTECTOR_LISTENERS."""
        self._base = {
            name: value
            for name, value in environ.items()
            if not (name + b"=").startswith(_NOT_PASSED_ON)
        }
        self._paths = [path_of(word) for word in listeners.split()]
        self._ours = {b"UNIXLOCALUID": b"%d" % os.getuid(), b"UNIXLOCALGID": b"%d" % os.getgid()}

    def of(self, fd: int, listener: int) -> dict[bytes, bytes] | None:
        """Return the environment for a connection; None: the client has disconnected.

        fd: the connection, which the caller keeps.  listener: the listener's index.
        """
        try:
            connection = socket.socket(fileno=fd)
        except OSError:
            return None
        try:
            remote = connection.getpeername()
            if connection.family != socket.AF_UNIX:
                return self._base | tcp(connection.getsockname(), remote)
            credentials = connection.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
            )
        except OSError:
            # ENOTCONN: the client has reset the connection.  What it has sent could be read.  But a
            # program that answers it fails, which first_programs.py counts against a new release.
            return None
        finally:
            connection.detach()
        path = self._paths[listener] if listener < len(self._paths) else b""
        return self._base | self._ours | unix(path, remote, credentials)


def tcp(local: Address, remote: Address) -> dict[bytes, bytes]:
    """Return the variables of a TCP connection; over IPv6 also the variables TCP6....

    A client with a mapped address (IPv4 on an IPv6 socket) counts as an IPv4 client.
    """
    ip, port = remote[0], b"%d" % remote[1]
    own, own_port = local[0].removeprefix(_MAPPED).encode(), b"%d" % local[1]
    mapped = ip.startswith(_MAPPED)
    address = ip.removeprefix(_MAPPED).encode()
    found = {
        b"PROTO": b"TCP",
        b"TCPLOCALIP": own,
        b"TCPLOCALPORT": own_port,
        b"TCPREMOTEIP": address,
        b"TCPREMOTEPORT": port,
        b"REMOTE_ADDR": address,
        b"REMOTE_PORT": port,
    }
    if ":" not in ip or mapped:
        return found
    found[b"PROTO"] = b"TCP6"
    found[b"TCP6LOCALIP"], found[b"TCP6LOCALPORT"] = own, own_port
    found[b"TCP6REMOTEIP"], found[b"TCP6REMOTEPORT"] = address, port
    scope = remote[3] if len(remote) > 3 else 0
    if scope:
        # A link-local address is useless without its interface.
        try:
            found[b"TCP6INTERFACE"] = socket.if_indextoname(scope).encode()
        except OSError:
            pass  # the interface was removed
    return found


def unix(local: bytes, remote: bytes | str, credentials: bytes) -> dict[bytes, bytes]:
    """Return the variables of a UNIX connection.

    credentials: of the process that connected, at that time.
    """
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    found = {
        b"PROTO": b"UNIX",
        b"UNIXLOCALPATH": local,
        b"UNIXREMOTEEUID": b"%d" % uid,
        b"UNIXREMOTEEGID": b"%d" % gid,
        b"UNIXREMOTEPID": b"%d" % pid,
    }
    name = os.fsencode(remote)
    if name[:1] == b"\0":
        name = b"@" + name[1:]
    # The client has chosen this name, so the name may have any bytes.
    if name and b"\0" not in name:
        found[b"UNIXREMOTEPATH"] = found[b"REMOTE_ADDR"] = name
    return found


def path_of(word: str) -> bytes:
    """Return the path in a percent-encoded `unix:/path` or `unix:@name`; b"" for other words."""
    kind, _, rest = word.partition(":")
    if kind != "unix":
        return b""
    first, *parts = os.fsencode(rest).split(b"%")
    return first + b"".join(bytes([int(part[:2], 16)]) + part[2:] for part in parts)
