"""The worker's end of the channel, from which it takes one connection at a time.

Rule: one system call for each connection, no waiting, no policy.  The caller of
`take` decides when to take, and keeps a descriptor free.

All workers and the protector share the channel's open file description.
So nothing here sets a flag, an option or a timeout on it: a
blocking mode set by one process would affect all.
"""

from __future__ import annotations

import os
import select
import socket
import struct

from . import system, wire
from .address import family_of
from .environment import read_environment
from .errors import Drained, OutOfDescriptors, ProtocolError
from .log import Logger
from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Union

_log = Logger(__name__)

# recvmsg, because socket.recv_fds ignores its flags in Python 3.11: descriptors
# would come without close-on-exec.
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC

# Not CMSG_SPACE of one int, which has room for two on 64-bit machines: a second
# descriptor would be received unnoticed, and stay open.
_CONTROL_BYTES = socket.CMSG_LEN(struct.calcsize("i"))
_FD = struct.Struct("i")

_HEADER = wire.HEADER.unpack
# State after the header is cut off on purpose: only a returned connection has
# state, and `take` refuses such messages.
_HEADER_BYTES = wire.HEADER.size


class Channel:
    """The queue of connections that all workers of a generation share.

    For a worker with its own event loop: watch `fileno()`, and call `take()` when the descriptor is
    readable.  At end of file the descriptor stays readable for ever.  Remove the descriptor from an
    epoll before closing it: other processes hold the same file open.
    """

    def __init__(self, fd: int, listeners: tuple[str, ...] = ()) -> None:
        """Take ownership of fd; listeners are the listen addresses in index order."""
        # SOCK_NONBLOCK in the type makes Python believe that the flag is set, and never set it.
        # Otherwise Python would set the flag if the program has called socket.setdefaulttimeout().
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        self._socket = Socket(socket.AF_UNIX, kind, 0, fileno=fd)
        #: Listen addresses in index order, such as `tcp:0.0.0.0:4321`.
        self.listeners = listeners
        #: The address family of each listener, None if unknown.  Passed to
        #: `socket.socket(family, type, 0, fd)`, the family saves system calls.
        self.families: tuple[Optional[int], ...] = tuple(map(family_of, listeners))

    @classmethod
    def from_environment(cls) -> Optional[Channel]:
        """Return the channel that the environment names; None: there is none.

        Only a protector with `--handoff connection` makes a channel.
        Call it once: the Channel owns the descriptor from then on.  Raises
        ProtocolError if the named descriptor is not a channel.
        """
        environment = read_environment(os.environ)
        if environment.channel_fd < 0:
            return None
        return cls(environment.channel_fd, environment.listeners)

    def fileno(self) -> int:
        """Return the descriptor to wait on.  Never set O_NONBLOCK on it: all workers share it."""
        return self._socket.fileno()

    def take(self) -> Optional[tuple[int, int, int]]:
        """Take one connection, or return None if none waits.  Never blocks.

        Returns (descriptor, listener index, time of accept in CLOCK_MONOTONIC ns).  The
        caller owns the descriptor, which is blocking and close-on-exec.

        Raises Drained at end of file.  Raises ProtocolError for a message of another
        version, whose connection is closed.  Raises OutOfDescriptors if the process had
        no free descriptor; that connection is lost.
        """
        while True:
            try:
                data, control, flags, _ = self._socket.recvmsg(
                    _HEADER_BYTES, _CONTROL_BYTES, _FLAGS
                )
            except BlockingIOError:
                return None
            if control and len(data) == _HEADER_BYTES:
                version, kind, listener, _, accepted_at_ns = _HEADER(data)
                if version == wire.VERSION and kind == wire.KIND_CONNECTION:
                    return _FD.unpack(control[0][2])[0], listener, accepted_at_ns
            _refuse(data, control, flags)

    def close(self) -> None:
        """Close this process's descriptor.  Other workers and the protector keep theirs."""
        self._socket.close()

    def detach(self) -> int:
        """Release ownership of the descriptor without closing it, and return it."""
        return self._socket.detach()


def has_ended(end: Union[Channel, socket.socket]) -> bool:
    """Return whether nothing more will come on a channel or a line; connections may still wait."""
    poll = system.poll()
    poll.register(end, select.POLLRDHUP)
    return bool(poll.poll(0))


def has_waiting(channel: Channel) -> bool:
    """Return whether connections wait in an ended channel; takes none."""
    return bool(channel._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))


def _refuse(data: bytes, control: list[tuple[int, int, bytes]], flags: int) -> None:
    """Raise the error for a message that is no connection; return if it can be skipped."""
    for _, _, content in control:
        os.close(_FD.unpack(content)[0])
    if not data and not control:
        raise Drained
    # Test this bit alone: recvmsg returns MSG_CMSG_CLOEXEC among the flags.
    if not control and flags & socket.MSG_CTRUNC:
        raise OutOfDescriptors
    if data[0] != wire.VERSION:
        raise ProtocolError(
            f"cannot read a message of version {data[0]}: this library speaks version "
            f"{wire.VERSION}; its connection is closed, update socketprotector-client"
        )
    if not control or len(data) < _HEADER_BYTES:
        raise ProtocolError(f"cannot read a message of {len(data)} bytes without a connection")
    # A returned connection is in the middle of its conversation, and must not be served as a new
    # connection.  This library never declares that it takes returned connections.
    _log.error("cannot serve a message of kind %d: unknown here; its connection is closed", data[1])
