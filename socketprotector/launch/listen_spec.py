"""Parses and checks the operator's listen addresses; bind.py binds them.

Source: ip(7), unix(7).
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from ..model.errors import UsageError
from ..model.lazy_dataclass import field, frozen
from ..model.text import shortened, whole
from . import socket_options
from .option_values import octal
from .users import MOST_ID

UNIX_OPTIONS = ("backlog", "group", "mode", "nonblock", "user")
#: An abstract socket has no file, so no permissions: any local user may connect.
_ABSTRACT_OPTIONS = ("backlog", "nonblock")
#: The longest path of a UNIX socket, without the final NUL (unix(7)).
_PATH_MAX_BYTES = 107
#: Longer than a name of 255 characters, a host of 253 characters and all options together.
_MOST_CHARS = 2000
#: The host of an address: a name, an IPv4 address, or an IPv6 address in brackets.
_HOST = re.compile(r"(?!\*\Z)[^][:]+|\[[^][]+\]", re.DOTALL)
#: NAME= before an address.  sd_listen_fds(3) allows names of up to 255 bytes.
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]{0,254})=(.*)", re.DOTALL)


@frozen
class Listen:
    """One LISTEN argument, checked but not resolved."""

    text: str
    port: int = 0
    host: str | None = None  # None: every address of this machine
    path: str | None = None  # of a UNIX socket; @name: an abstract socket
    passed: str | None = None  # the name of a socket that the service manager passes to us
    options: dict[str, str] = field(default_factory=dict)
    called: str = ""  # the NAME of NAME=ADDRESS

    @property
    def name(self) -> str:
        """The name by which a worker may refer to the listener."""
        if self.called or self.passed is not None:
            return self.called or self.passed or ""
        return os.path.basename(self.path) if self.path is not None else str(self.port)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of ListenerSettings for each socket of the argument."""
        return {
            "text": self.text,
            "name": self.name,
            "nonblock": self.options.get("nonblock") == "1",
            "priority": socket_options.number(self.options.get("priority", "")),
        }

    @property
    def port_is_chosen(self) -> bool:
        """Whether the kernel chooses the port: a TCP address with port 0."""
        return self.path is None and self.passed is None and not self.port

    def backlog(self, default: int) -> int:
        """Return the backlog of the argument's option, or the default."""
        own = self.options.get("backlog")
        return default if own is None else socket_options.number(own)

    def means(self, address: str) -> bool:
        """Return True if a socket bound to this canonical TCP address satisfies the argument."""
        if self.path is not None or self.passed is not None or self.port_is_chosen:
            return False
        hosts = [self.host] if self.host is not None else ["0.0.0.0", "::"]
        return any(address in (f"tcp:{h}:{self.port}", f"tcp:[{h}]:{self.port}") for h in hosts)


def options_in(text: str) -> str:
    """Return the options of a LISTEN argument as they were written: the part after the `?`."""
    return text.partition("?")[2]


def parse(text: str, directory: str) -> Listen:
    """Parse a LISTEN argument.  Raises UsageError with the argument and the allowed forms.

    directory: where relative UNIX paths start.
    """
    if len(text) > _MOST_CHARS:
        raise UsageError(f"{shortened(text)}: too long for an address")
    named = _NAMED.fullmatch(text)
    called, rest = named.groups() if named else ("", text)
    body, _, query = rest.partition("?")
    lower = body.lower()
    if (
        lower.startswith("udp:")
        or lower.endswith("/udp")
        or (lower[:1] == "u" and whole(lower[1:], 65535) is not None)
    ):
        raise UsageError(
            f"{text}: UDP has no connections to hand over; let the daemon bind this address"
        )
    where: dict[str, Any]
    allowed: Sequence[str]
    if body.startswith("fd:"):
        where, allowed = {"passed": body.removeprefix("fd:")}, ()
        if not where["passed"]:
            raise UsageError(f"{text}: fd: needs the name of a socket that was passed to us")
    elif body.startswith("unix:"):
        path = body.removeprefix("unix:")
        if not path or path == "@":
            raise UsageError(f"{text}: unix: needs a path, or @name")
        if not path.startswith("@"):
            path = os.path.join(directory, path)
        if len(os.fsencode(path)) > _PATH_MAX_BYTES:
            raise UsageError(f"{text}: a UNIX socket's path has {_PATH_MAX_BYTES} bytes at most")
        where = {"path": path}
        allowed = _ABSTRACT_OPTIONS if path.startswith("@") else UNIX_OPTIONS
    else:
        host, colon, port = body.rpartition(":")
        if "=" in body:
            raise UsageError(
                f"{shortened(text, 200)}: before = write a name of letters, digits, _, . and -, "
                "which begins with a letter or _"
            )
        if colon and not _HOST.fullmatch(host):
            raise UsageError(
                f"{text}: write PORT (on every address), HOST:PORT, [HOST6]:PORT, unix:PATH or "
                "fd:NAME; NAME=ADDRESS names the listener"
            )
        number = whole(port, 65535)
        if number is None and body.startswith(("/", "./", "../")):
            raise UsageError(f"{shortened(text, 200)}: for a UNIX socket write unix:PATH")
        if number is None:
            raise UsageError(f"{shortened(text, 200)}: the port must be a number from 0 to 65535")
        where = {"port": number, "host": host.strip("[]") if colon else None}
        allowed = tuple(socket_options.OPTIONS)
    return Listen(text, options=_options(text, query, allowed), called=called, **where)


def _options(text: str, query: str, allowed: Sequence[str]) -> dict[str, str]:
    found = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in found.items():
        if name not in allowed:
            raise UsageError(
                f"{text}: unknown option {name}; allowed: {', '.join(allowed) or 'none'}"
            )
        if name in socket_options.OPTIONS:
            socket_options.check(text, name, value)
        if name in _CHECKS:
            _CHECKS[name](text, value)
    return found


def mode_of(text: str, mode: str) -> int:
    """Return an octal mode.  Raises UsageError, which begins with `text`."""
    try:
        return octal(mode)
    except ValueError:
        raise UsageError(f"{text}: mode must be octal, like 0660") from None


def uid_of(text: str, user: str) -> int:
    """Return the uid of a user, given by name or number.  Raises UsageError as mode_of() does."""
    try:
        number = whole(user, MOST_ID)
        return pwd.getpwnam(user).pw_uid if number is None else number
    except (KeyError, ValueError):  # ValueError: no name can have a NUL
        raise UsageError(f"{shortened(text, 200)}: unknown user {shortened(user)}") from None


def gid_of(text: str, group: str) -> int:
    """Return the gid of a group, given by name or number.  Raises UsageError as mode_of() does."""
    try:
        number = whole(group, MOST_ID)
        return grp.getgrnam(group).gr_gid if number is None else number
    except (KeyError, ValueError):  # ValueError: no name can have a NUL
        raise UsageError(f"{shortened(text, 200)}: unknown group {shortened(group)}") from None


_CHECKS = {"mode": mode_of, "user": uid_of, "group": gid_of}
