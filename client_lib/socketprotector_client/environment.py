"""What the protector tells a worker through its environment.

Rule: reads and checks, keeps nothing.  The one thing it does to the process
is to set close-on-exec on the descriptors named there, so that a program
which the worker starts never holds a channel open or takes from it.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from typing import Mapping, Optional, Tuple

from . import wire
from .errors import ProtocolError
from .system import Socket

#: As sd_listen_fds(3) has it.
_FIRST_PASSED = 3


@dataclass(frozen=True)
class Environment:
    """A worker's place: its descriptors and what its connections' listeners are called."""

    channel_fd: int
    #: This worker's own line to the protector, -1 if it has none.
    return_fd: int
    #: Listen addresses in index order, such as `tcp:0.0.0.0:4321`.
    listeners: tuple[str, ...]
    generation: int
    worker: int
    #: How many workers take from the channel, as many as there were to be at the start.
    workers: int = 1
    #: The scoreboard's descriptor, -1 without one, and where in it this worker's record is.
    board_fd: int = -1
    board_offset: int = 0


def read_environment(environ: Mapping[str, str]) -> Optional[Environment]:
    """Return the worker's place, or None where no protector started this process.

    Raises ProtocolError if the variables are there but the channel is not.
    """
    if wire.ENV_CHANNEL not in environ:
        return None
    channel_fd = _number(environ, wire.ENV_CHANNEL, -1)
    return_fd = _number(environ, wire.ENV_RETURN, -1)
    _check_channel(channel_fd)
    board_fd, board_offset = _board(environ.get(wire.ENV_SCOREBOARD, ""))
    for fd in (channel_fd, return_fd, board_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)
    return Environment(
        channel_fd=channel_fd,
        return_fd=return_fd,
        listeners=tuple(wire.unpack_listeners(environ.get(wire.ENV_LISTENERS, ""))),
        generation=_number(environ, wire.ENV_GENERATION, 0),
        worker=_number(environ, wire.ENV_WORKER, 0),
        workers=max(1, _number(environ, wire.ENV_WORKERS, 1)),
        board_fd=board_fd,
        board_offset=board_offset,
    )


def passed_listeners(environ: Mapping[str, str]) -> Tuple[int, ...]:
    """Return the listening sockets that this process was handed, none where it was not.

    `--handoff listener`, or any service manager.  Source: sd_listen_fds(3).
    """
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return ()
    found = tuple(fd for fd in range(_FIRST_PASSED, _FIRST_PASSED + int(count)) if _listens(fd))
    for fd in found:
        os.set_inheritable(fd, False)
    return found


def _listens(fd: int) -> bool:
    try:
        probe = socket.socket(fileno=fd)
    except OSError:
        return False  # no socket, or nothing at all
    try:
        listening = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return bool(listening) and probe.type == socket.SOCK_STREAM
    finally:
        probe.detach()


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ProtocolError(f"cannot use {name}={text!r}: it is not a number")
    return int(text)


def _board(text: str) -> Tuple[int, int]:
    # Nothing that a worker could not do without: what is no scoreboard is none.
    fd, _, offset = text.partition(":")
    return (int(fd), int(offset)) if fd.isdecimal() and offset.isdecimal() else (-1, 0)


def _check_channel(fd: int) -> None:
    # Variables are inherited further than descriptors.  A program started by a
    # worker would otherwise take whatever happens to have this number.
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False
    if is_socket:
        probe = Socket(fileno=fd)
        try:
            if (probe.family, probe.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                return
        finally:
            probe.detach()
    raise ProtocolError(
        f"cannot use descriptor {fd} named by {wire.ENV_CHANNEL}: it is not a channel; "
        f"a program that a worker starts inherits the variable but not the descriptor, "
        f"so unset {wire.ENV_CHANNEL} for it"
    )
