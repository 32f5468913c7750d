"""The worker's end of the channel: takes one connection at a time, and nothing else.

Rule: one system call for one connection, no waiting, no policy.  The caller of
`take` decides when, and has a descriptor to spare.

The channel's open file description is shared by all workers and the
protector.  So nothing here sets a flag, an option or a timeout on it: a
blocking mode set by one would hit all.
"""

from __future__ import annotations

import os
import socket
import struct

from . import wire
from .address import family_of
from .environment import read_environment
from .errors import Drained, OutOfDescriptors, ProtocolError
from .log import Logger
from .system import Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

_log = Logger(__name__)

# socket.recv_fds drops its flags in Python 3.11, so it would hand out
# descriptors without close-on-exec; hence recvmsg.
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC

# CMSG_SPACE of one int has room for two on 64-bit machines: the second one
# would be received unnoticed, and stay open.
_CONTROL_BYTES = socket.CMSG_LEN(struct.calcsize("i"))
_FD = struct.Struct("i")

_HEADER = wire.HEADER.unpack
# State after the header is cut off on purpose: only a returned connection has
# any, and those are refused here.
_HEADER_BYTES = wire.HEADER.size


class Channel:
    """The queue of connections that all workers of a generation share.

    For a worker with a loop of its own: watch `fileno()` and call `take()` when
    it is readable.  At the end of the file it stays readable for ever; remove
    it from an epoll before closing it, for other processes hold it too.
    """

    def __init__(self, fd: int, listeners: tuple[str, ...] = ()) -> None:
        """Take ownership of fd; listeners are the listen addresses in index order."""
        # With the flag named, Python takes it for set and sets it never, which it does otherwise
        # after socket.setdefaulttimeout.
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        self._socket = Socket(socket.AF_UNIX, kind, 0, fileno=fd)
        #: Listen addresses in index order, such as `tcp:0.0.0.0:4321`.
        self.listeners = listeners
        #: Address family of each listener; with it `socket.socket(family, type, 0, fd)`
        #: needs not ask the kernel.
        self.families: tuple[Optional[int], ...] = tuple(map(family_of, listeners))

    @classmethod
    def from_environment(cls) -> Optional[Channel]:
        """Return the channel this worker was started with, None without a protector.

        Call it once: the Channel owns the descriptor from then on.  Raises
        ProtocolError if the environment names something that is no channel.
        """
        environment = read_environment(os.environ)
        if environment.channel_fd < 0:
            return None
        return cls(environment.channel_fd, environment.listeners)

    def fileno(self) -> int:
        """Return the descriptor to wait on.  Never set O_NONBLOCK on it."""
        return self._socket.fileno()

    def take(self) -> Optional[tuple[int, int, int]]:
        """Take one connection; return None when there is none now.  Never blocks.

        Returns (descriptor, listener index, CLOCK_MONOTONIC ns at accept).  The
        caller owns the descriptor, which is blocking and close-on-exec.

        Raises Drained at the end of the file, ProtocolError for a message of
        another version (its connection is closed), OutOfDescriptors if the
        process had no descriptor left: then that connection is lost.
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
        """Give up ownership of the descriptor without closing it, and return it."""
        return self._socket.detach()


def _refuse(data: bytes, control: list[tuple[int, int, bytes]], flags: int) -> None:
    """Raise what is wrong with a message, or return if it may be passed over."""
    for _, _, content in control:
        os.close(_FD.unpack(content)[0])
    if not data and not control:
        raise Drained
    # This bit alone: MSG_CMSG_CLOEXEC comes back among the flags, so they are never 0.
    if not control and flags & socket.MSG_CTRUNC:
        raise OutOfDescriptors
    if data[0] != wire.VERSION:
        raise ProtocolError(
            f"cannot read a message of version {data[0]}: this library speaks version "
            f"{wire.VERSION}; its connection is closed, update socketprotector-client"
        )
    if not control or len(data) < _HEADER_BYTES:
        raise ProtocolError(f"cannot read a message of {len(data)} bytes without a connection")
    # A connection in the middle of its conversation must not be served as a
    # new one, and this library never says that it takes such.
    _log.error("cannot serve a message of kind %d: unknown here; its connection is closed", data[1])
