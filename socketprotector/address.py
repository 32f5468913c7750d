"""Listen addresses: parse what the operator wrote, and bind it.

Runs in the launching process only, so that whatever is wrong is said on the operator's
terminal before anything has changed.

Source: bind(2), tcp(7), ipv6(7), unix(7).
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

import psutil

from .errors import Refusal, SystemRefused, UsageError
from .folder import locked
from .settings import ListenerSettings

_TCP_OPTIONS = ("backlog", "defer_accept", "device", "freebind", "v6only")
_UNIX_OPTIONS = ("backlog", "group", "mode", "user")
_PATH_MAX_BYTES = 107
#: One number for two sockets: another program may take it between the two binds.
_SAME_PORT_TRIES = 16
_IP_FREEBIND = 15
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Listen:
    """One LISTEN argument, checked but not resolved."""

    text: str
    port: int = 0
    host: str | None = None  # None: every address of this machine
    path: str | None = None  # UNIX; @name for an abstract one
    options: dict[str, str] = field(default_factory=dict)

    def backlog(self, default: int) -> int:
        return int(self.options.get("backlog", default))


@dataclass(frozen=True, slots=True)
class Bound:
    """A listening socket and what is known of it."""

    socket: socket.socket
    settings: ListenerSettings

    def discard(self) -> None:
        """Close it, and remove the socket file it made."""
        self.socket.close()
        if self.settings.inode:
            path = self.settings.address.removeprefix("unix:")
            try:
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == (self.settings.device, self.settings.inode):
                    os.unlink(path)
            except OSError:
                pass  # removed already


def parse(text: str, directory: str) -> Listen:
    """Read one LISTEN argument; a relative UNIX path is taken against directory.

    Raises UsageError with the argument and what is allowed.
    """
    body, _, query = text.partition("?")
    lower = body.lower()
    if (
        lower.startswith("udp:")
        or lower.endswith("/udp")
        or (lower[:1] == "u" and _whole(lower[1:]))
    ):
        raise UsageError(
            f"{text}: UDP has no connections that could be handed over; let the daemon bind it"
        )
    if body.startswith("unix:"):
        path = body.removeprefix("unix:")
        if not path or path == "@":
            raise UsageError(f"{text}: unix: needs a path, or @name")
        if not path.startswith("@"):
            path = os.path.join(directory, path)
        if len(os.fsencode(path)) > _PATH_MAX_BYTES:
            raise UsageError(f"{text}: a UNIX socket's path has {_PATH_MAX_BYTES} bytes at most")
        return Listen(text, path=path, options=_options(text, query, _UNIX_OPTIONS))
    host, colon, port = body.rpartition(":")
    if colon and (not host or (":" in host and not host.startswith("["))):
        raise UsageError(f"{text}: write PORT, HOST:PORT, [HOST6]:PORT or unix:PATH")
    if not _whole(port) or int(port) > 65535:
        raise UsageError(f"{text}: the port must be a number from 0 to 65535")
    return Listen(
        text,
        port=int(port),
        host=host.strip("[]") if colon else None,
        options=_options(text, query, _TCP_OPTIONS),
    )


def _options(text: str, query: str, allowed: Sequence[str]) -> dict[str, str]:
    found = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in found.items():
        if name not in allowed:
            raise UsageError(f"{text}: unknown option {name}; allowed: {', '.join(allowed)}")
        if name in ("backlog", "defer_accept") and not (_whole(value) and 0 < int(value) < 2**31):
            raise UsageError(f"{text}: {name} must be a whole number above 0")
        if name == "device" and not value:
            raise UsageError(f"{text}: device needs a name, like eth0")
        if name in ("v6only", "freebind") and value not in ("0", "1"):
            raise UsageError(f"{text}: {name} must be 0 or 1")
        if name == "mode":
            _number(text, "mode", value)
        if name == "user":
            _uid(text, value)
        if name == "group":
            _gid(text, value)
    return found


def _whole(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(text: str, name: str, value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError(f"{text}: {name} must be octal, like 0660")
    return mode


def _uid(text: str, user: str) -> int:
    try:
        return int(user) if _whole(user) else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"{text}: unknown user {user}") from None


def _gid(text: str, group: str) -> int:
    try:
        return int(group) if _whole(group) else grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"{text}: unknown group {group}") from None


def bind_all(
    listens: Sequence[Listen], backlog: int, *, notice: Callable[[str], None], dry: bool = False
) -> list[Bound]:
    """Bind every address, in order, and listen; dry: only see whether it could be done.

    The caller owns what is returned (nothing when dry).  When one fails, what was bound
    before is closed again.  Raises Refusal.  `notice` is told what is worth knowing.
    """
    bound: list[Bound] = []
    try:
        for listen in listens:
            if listen.path is not None:
                bound += _bind_unix(listen, listen.backlog(backlog), dry=dry)
            else:
                bound += _bind_tcp(listen, listen.backlog(backlog), notice, dry=dry)
    except BaseException:
        for each in bound:
            each.discard()
        raise
    if dry:
        for each in bound:
            each.socket.close()
        return []
    return bound


# -- TCP -----------------------------------------------------------------------


def _addresses(
    listen: Listen, notice: Callable[[str], None]
) -> list[tuple[socket.AddressFamily, str]]:
    """Return the (family, numeric host) pairs that a LISTEN argument means."""
    if listen.host is None and listen.options.get("v6only") == "0" and _has_ipv6():
        return [(socket.AF_INET6, "::")]  # takes IPv4 too
    if listen.host is None:
        found = [(socket.AF_INET, "0.0.0.0")]
        if _has_ipv6():
            found.append((socket.AF_INET6, "::"))
        else:
            notice(f"{listen.text}: no IPv6 here; listening on 0.0.0.0 only")
        return found
    try:
        answers = socket.getaddrinfo(
            listen.host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "no valid name"
        raise SystemRefused(
            f"cannot resolve {listen.host} in {listen.text}: {reason}; check the name, "
            "or write the address as a number"
        ) from error
    found = list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in answers))
    usable = [each for each in found if each[0] != socket.AF_INET6 or _has_ipv6()]
    if usable and usable != found:
        notice(f"{listen.text}: no IPv6 here; listening on {usable[0][1]} only")
    return usable or found


def _has_ipv6() -> bool:
    """Whether an IPv6 socket can be bound: the kernel may lack it, or have it turned off."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        return error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    return True


def _bind_tcp(
    listen: Listen, backlog: int, notice: Callable[[str], None], *, dry: bool
) -> list[Bound]:
    addresses = _addresses(listen, notice)
    for tries_left in reversed(range(_SAME_PORT_TRIES)):
        bound: list[Bound] = []
        port = listen.port
        try:
            for family, host in addresses:
                each = _bind_one(listen, family, host, port, None if dry else backlog)
                bound.append(each)
                port = each.socket.getsockname()[1]
        except OSError as error:
            for each in bound:
                each.socket.close()
            taken = error.errno == errno.EADDRINUSE and listen.port == 0 and bound
            if not (taken and tries_left):
                raise _cannot_bind(listen, host, port, error) from error
        else:
            return bound
    raise AssertionError("the last try returns or raises")


def _bind_one(
    listen: Listen, family: socket.AddressFamily, host: str, port: int, backlog: int | None
) -> Bound:
    options = listen.options
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            only = int(options.get("v6only", "1"))
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        if options.get("freebind") == "1":
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        if "device" in options:
            device = os.fsencode(options["device"])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        if "defer_accept" in options:
            seconds = int(options["defer_accept"])
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, seconds)
        sock.setblocking(False)
        sock.bind((host, port))
        if backlog is not None:
            sock.listen(backlog)
        chosen = sock.getsockname()[1]
    except BaseException:
        sock.close()
        raise
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return Bound(sock, ListenerSettings(f"tcp:{shown}:{chosen}"))


def _cannot_bind(listen: Listen, host: str, port: int, error: OSError) -> Refusal:
    what = f"cannot listen on {listen.text} ({host} port {port}): {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        return SystemRefused(f"{what}; {_holder(host, port)}")
    if error.errno == errno.EACCES:
        return SystemRefused(
            f"{what}; a port this low needs root or CAP_NET_BIND_SERVICE: start as root with "
            "--user, or choose another port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return SystemRefused(f"{what}; no interface has it: add ?freebind=1 if one will")
    if error.errno == errno.ENODEV:
        return SystemRefused(f"{what}; see `ip link` for the devices there are")
    return SystemRefused(f"{what}; check the address and its options")


def _holder(host: str, port: int) -> str:
    """Say which process listens there, where the system tells."""
    pid = None
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            there = {connection.laddr.ip, host} & {"0.0.0.0", "::"}
            if connection.laddr.port == port and (there or connection.laddr.ip == host):
                pid = pid or connection.pid
    except (psutil.Error, OSError):
        pass  # no /proc, or it is closed to us
    return f"{_called(pid)} has it: stop that, or choose another"


def _called(pid: int | None) -> str:
    """Name a process by its number and program."""
    try:
        return f"process {pid} ({psutil.Process(pid).name()})" if pid else "another program"
    except psutil.Error:
        return "another program"  # it has ended, and left its socket to a child


# -- UNIX ----------------------------------------------------------------------


def _bind_unix(listen: Listen, backlog: int, *, dry: bool) -> list[Bound]:
    path = listen.path
    assert path is not None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if path.startswith("@"):
            sock.bind("\0" + path[1:])
            if not dry:
                sock.listen(backlog)
            settings = ListenerSettings(f"unix:{path}", backlog=backlog)
        else:
            settings = _bind_path(sock, listen, path, backlog, dry=dry)
    except OSError as error:
        sock.close()
        what = f"cannot listen on {listen.text}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            who = _called(_peer("\0" + path[1:] if path.startswith("@") else path))
            raise SystemRefused(f"{what}; {who} has it: stop that, or choose another") from error
        if error.errno == errno.EPERM and {"user", "group"} & set(listen.options):
            raise SystemRefused(f"{what}; to give a socket away needs root") from error
        raise SystemRefused(f"{what}; check the folder, its rights and the options") from error
    except BaseException:
        sock.close()
        raise
    return [Bound(sock, settings)]


def _bind_path(
    sock: socket.socket, listen: Listen, path: str, backlog: int, *, dry: bool
) -> ListenerSettings:
    """Bind a socket file; one that nobody listens on is replaced, a living one is not."""
    with locked(path):
        stale = _is_stale(path)
        if dry:
            if not os.access(os.path.dirname(path), os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return ListenerSettings(f"unix:{path}")
        if stale:
            os.unlink(path)
        mode = listen.options.get("mode")
        # The mode must hold from the first moment, so the umask makes it, not chmod.
        before = os.umask(0o777 & ~int(mode, 8)) if mode is not None else None
        try:
            sock.bind(path)
        finally:
            if before is not None:
                os.umask(before)
        try:
            _give(path, listen)
            sock.listen(backlog)  # still under the lock: it would look stale to the next
            found = os.lstat(path)
        except OSError:
            os.unlink(path)
            raise
    return ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino, backlog)


def _give(path: str, listen: Listen) -> None:
    """Give a socket file to the user and group that were asked for."""
    user, group = listen.options.get("user"), listen.options.get("group")
    uid = -1 if user is None else _uid(listen.text, user)
    gid = -1 if group is None else _gid(listen.text, group)
    if (uid, gid) != (-1, -1):
        os.chown(path, uid, gid, follow_symlinks=False)


def _is_stale(path: str) -> bool:
    """Whether a socket file is there that nobody listens on.

    Raises OSError(EADDRINUSE) when somebody does, and OSError(EEXIST) for what is no socket.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "a file that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            pass  # its backlog is full: somebody lives there
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
            # a datagram socket, and somebody has it open
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _peer(address: str) -> int | None:
    """Return the pid of who listens on a UNIX socket, if it lets us ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(address)
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None
    pid, _, _ = _CREDENTIALS.unpack(found)
    return int(pid)
