"""Listen addresses as the operator writes them, read and checked; bind.py binds them.

Source: ip(7), unix(7).
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from .errors import UsageError

_TCP_OPTIONS = ("backlog", "defer_accept", "device", "freebind", "v6only")
_UNIX_OPTIONS = ("backlog", "group", "mode", "user")
_PATH_MAX_BYTES = 107


@dataclass(frozen=True, slots=True)
class Listen:
    """One LISTEN argument, checked but not resolved."""

    text: str
    port: int = 0
    host: str | None = None  # None: every address of this machine
    path: str | None = None  # UNIX; @name for an abstract one
    name: str | None = None  # of a socket that the service manager passes to us
    options: dict[str, str] = field(default_factory=dict)

    def backlog(self, default: int) -> int:
        return int(self.options.get("backlog", default))

    def means(self, address: str) -> bool:
        """Whether a socket that is bound to this canonical address is what is wanted."""
        if self.path is not None:
            return address == f"unix:{self.path}"
        if self.name is not None or not self.port:
            return False
        hosts = [self.host] if self.host is not None else ["0.0.0.0", "::"]
        return any(address in (f"tcp:{h}:{self.port}", f"tcp:[{h}]:{self.port}") for h in hosts)


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
    if body.startswith("fd:"):
        if not body.removeprefix("fd:"):
            raise UsageError(f"{text}: fd: needs the name of a socket that was passed to us")
        return Listen(text, name=body.removeprefix("fd:"), options=_options(text, query, ()))
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
        raise UsageError(f"{text}: write PORT, HOST:PORT, [HOST6]:PORT, unix:PATH or fd:NAME")
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
            raise UsageError(
                f"{text}: unknown option {name}; allowed: {', '.join(allowed) or 'none'}"
            )
        if name in ("backlog", "defer_accept") and not (_whole(value) and 0 < int(value) < 2**31):
            raise UsageError(f"{text}: {name} must be a whole number above 0")
        if name == "device" and not value:
            raise UsageError(f"{text}: device needs a name, like eth0")
        if name in ("v6only", "freebind") and value not in ("0", "1"):
            raise UsageError(f"{text}: {name} must be 0 or 1")
        if name == "mode":
            _number(text, "mode", value)
        if name == "user":
            uid_of(text, value)
        if name == "group":
            gid_of(text, value)
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


def uid_of(text: str, user: str) -> int:
    try:
        return int(user) if _whole(user) else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"{text}: unknown user {user}") from None


def gid_of(text: str, group: str) -> int:
    try:
        return int(group) if _whole(group) else grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"{text}: unknown group {group}") from None
