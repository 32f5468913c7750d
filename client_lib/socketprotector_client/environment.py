"""The worker's environment variables from the protector, read and checked.

Rule: keeps nothing.  The only effect on the process is close-on-exec on the descriptors that the
variables name.  So a program that the worker starts never holds a channel open, nor takes
connections from it.
"""

from __future__ import annotations

import os
import socket
import stat

from . import wire
from .errors import ProtocolError
from .log import Logger
from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Mapping, Optional, Tuple

#: The first passed descriptor, by sd_listen_fds(3).
_FIRST_PASSED = 3
#: The most digits of a count of passed sockets, of a descriptor, and of any other number.
_COUNT_DIGITS, _FD_DIGITS, _DIGITS = 4, 6, 9
_log = Logger(__name__)


class Environment:
    """A worker's descriptors (-1: missing) and the names of its listeners."""

    def __init__(self) -> None:
        self.channel_fd = -1
        #: This worker's own line to the protector.
        self.return_fd = -1
        #: Listen addresses in index order, such as `tcp:0.0.0.0:4321`.
        self.listeners: Tuple[str, ...] = ()
        #: The number of workers that take from the channel, as configured at the start.
        self.workers = 1
        #: The scoreboard's descriptor, and the offset of this worker's record in bytes.
        self.board = (-1, 0)
        #: Seconds over which the connections end at a drain; 0.0: only at a stop; None: they are
        #: never ended.
        self.spread_s: Optional[float] = None
        #: Without a channel: listening sockets to accept from.
        self.passed: Tuple[int, ...] = ()
        #: The paths of UNIX sockets among these: each is bound under another name beside its path.
        self.paths: Dict[int, str] = {}


def read_environment(environ: Mapping[str, str]) -> Environment:
    """Return the worker's descriptors and listeners; none if no protector started this process.

    Raises ProtocolError if the variables name a descriptor that is not a channel or RETURN line.
    """
    found = Environment()
    if wire.ENV_CHANNEL not in environ:
        found.passed = passed_listeners(environ)
        if found.passed:
            _add_lines(environ, found)
        return found
    found.channel_fd = _line(environ, wire.ENV_CHANNEL, "a channel")
    found.listeners = tuple(wire.unpack_listeners(environ.get(wire.ENV_LISTENERS, "")))
    found.workers = max(1, _number(environ, wire.ENV_WORKERS, 1))
    _add_lines(environ, found)
    return found


def _add_lines(environ: Mapping[str, str], found: Environment) -> None:
    """Add the RETURN line and the scoreboard that the environment names."""
    if found.passed and not _is_line(_number(environ, wire.ENV_RETURN, -1)):
        return  # the sockets came from another service manager, which itself runs under a protector
    if environ.get(wire.ENV_RETURN):
        found.return_fd = _line(environ, wire.ENV_RETURN, "a RETURN line")
    found.paths = _paths(environ.get("SERVER_STARTER_PORT", ""))
    if environ.get(wire.ENV_DRAIN_SPREAD) or environ.get(wire.ENV_STOP_SPREAD):
        found.spread_s = _seconds(environ.get(wire.ENV_DRAIN_SPREAD, ""))
    # The scoreboard is optional, so a value that does not name one is ignored.
    board, _, offset = environ.get(wire.ENV_SCOREBOARD, "").partition(":")
    if all(each.isdecimal() and len(each) <= _DIGITS for each in (board, offset)):
        try:
            if not stat.S_ISSOCK(os.fstat(int(board)).st_mode):
                os.set_inheritable(int(board), False)
                found.board = int(board), int(offset)
        except OSError:
            pass


def passed_listeners(environ: Mapping[str, str]) -> Tuple[int, ...]:
    """Return the listening sockets that were passed to this process; empty without any.

    They come from `--handoff listener`, or any service manager.  Source: sd_listen_fds(3).
    """
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return ()
    if not count.isdecimal() or len(count) > _COUNT_DIGITS:
        return ()
    passed = range(_FIRST_PASSED, _FIRST_PASSED + int(count))
    found = tuple(fd for fd in passed if _kind_of(fd)[1:] == (socket.SOCK_STREAM, 1))
    if passed and not found:
        _log.warning(
            "LISTEN_FDS=%s: no descriptor is a listening stream socket, so all are ignored; for "
            "systemd write ListenStream= and Accept=no",
            count,
        )
    for fd in found:
        os.set_inheritable(fd, False)
    return found


def _paths(text: str) -> Dict[int, str]:
    """Return the paths by descriptor in a text such as `127.0.0.1:80=3;/run/x.sock=4`."""
    pairs = [each.rpartition("=") for each in text.split(";")]
    return {
        int(fd): path
        for path, _, fd in pairs
        if path.startswith("/") and fd.isdecimal() and len(fd) <= _FD_DIGITS
    }


def _line(environ: Mapping[str, str], name: str, what: str) -> int:
    """Return the descriptor of a channel or RETURN line.  Raises ProtocolError if it is neither."""
    fd = _number(environ, name, -1)
    # A program that a worker starts inherits the variables, but not the descriptors.
    # Another file may have this number there.
    if not _is_line(fd):
        raise ProtocolError(
            f"cannot use descriptor {fd} named by {name}: it is not {what}; "
            f"a program that a worker starts inherits the variable but not the descriptor, "
            f"so unset {name} for it"
        )
    os.set_inheritable(fd, False)
    return fd


def _is_line(fd: int) -> bool:
    return _kind_of(fd)[:2] == (socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _kind_of(fd: int) -> Tuple[int, int, int]:
    """Return a socket's family, its type, and 1 if it listens; (-1, -1, 0) for any other file."""
    options = socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_ACCEPTCONN
    try:
        # SOCK_NONBLOCK keeps Python from setting the flag on a socket that other processes share.
        # Python would set it if the program has called socket.setdefaulttimeout().
        probe = Socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, fd)
    except (OSError, ValueError):
        return -1, -1, 0
    try:
        family, kind, listens = (probe.getsockopt(socket.SOL_SOCKET, each) for each in options)
        return family, kind, listens
    finally:
        probe.detach()


def _seconds(text: str) -> float:
    # A newer protector may write another format; then only the time in the scoreboard counts.
    whole, _, part = text.partition(".")
    fits = whole.isdecimal() and len(whole) <= _DIGITS and (part or "0").isdecimal()
    return float(text) if fits else 0.0


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if text and not (text.isdecimal() and len(text) <= _DIGITS):
        raise ProtocolError(f"cannot use {name}={text[:40]!r}: it is not a number")
    return int(text or default)
