"""Tell the protector (or systemd, where there is none) how this process is doing.

Datagrams to NOTIFY_SOCKET, whose queue has room for a few (net.unix.max_dgram_qlen, 10) until the
receiver reads on.  A message is never worth blocking for, nor failing for; but one that found no
room must not be lost either, because most are sent once: without READY=1 a start has failed.
So a thread waits for room instead of the caller, and ends when nothing waits.

One connected socket is kept for life: it gets WATCHDOG=1 out when no descriptor is left, and when
the path was removed or cannot be seen any more (chroot).

Source: man 3 sd_notify; unix(7).
"""

from __future__ import annotations

import atexit
import errno
import os
import socket
from functools import lru_cache

from . import forking, wire
from .system import Socket, allocate_lock, start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Optional, Sequence, Tuple

#: As without a connection: the receiver is gone, and maybe another one came.
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)


def notify(*lines: str, **fields: object) -> bool:
    """Send lines such as "READY=1", and fields (`status="warm"` becomes STATUS=warm).

    All of them travel in one datagram.  Never blocks and never raises because
    of the receiver.  Returns True if the datagram was handed to the kernel,
    False if there is no NOTIFY_SOCKET or no receiver, or if there is no room now: then it is sent
    as soon as there is, unless the same names have been given other values by then.
    """
    address = os.environ.get(wire.ENV_NOTIFY, "")
    if not address.startswith(("/", "@")):
        return False
    words = [*lines, *(f"{name.upper()}={value}" for name, value in fields.items())]
    # A line end within a value would be read as the next assignment.
    return _sender(address).send([" ".join(word.splitlines()) for word in words])


class _Sender:
    """The way to one address."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._line: Optional[socket.socket] = None
        self.after_fork_in_child()
        forking.register(self)

    def after_fork_in_child(self) -> None:
        # What the parent waits to send, and its thread, are not the child's.
        self._lock = allocate_lock()
        self._waiting: Dict[Tuple[str, ...], bytes] = {}  # names -> message, oldest first
        self._has_thread = False
        self.close()

    def close(self) -> None:
        if self._line is not None:
            atexit.unregister(self._line.detach)
            self._line.close()
            self._line = None

    def send(self, words: Sequence[str]) -> bool:
        """Send a message now, else later; return whether it was sent."""
        message = "\n".join(words).encode("utf-8", "replace")
        with self._lock:
            if not self._waiting:
                try:
                    self._send(message, socket.MSG_DONTWAIT)
                except OSError as error:
                    if error.errno not in _FULL:
                        return False
                else:
                    return True
            # Behind what waits already, and instead of what it makes out of date.
            names = tuple(word.partition("=")[0] for word in words)
            self._waiting.pop(names, None)
            self._waiting[names] = message
            if not self._has_thread:
                try:
                    start_thread(self._send_waiting, ())
                    self._has_thread = True
                except RuntimeError:
                    pass  # no more threads: the next message tries again
        return False

    def _send_waiting(self) -> None:
        """In a thread: send all that waits, one after the other, waiting for room."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._has_thread = False
                    return
                names, message = next(iter(self._waiting.items()))
            try:
                self._send(message, 0)
            except OSError:
                pass  # there is no receiver any more
            with self._lock:
                if self._waiting.get(names) is message:
                    del self._waiting[names]

    def _send(self, message: bytes, flags: int) -> None:
        """Send it, connecting anew where the receiver was replaced.  Raises OSError."""
        flags |= socket.MSG_NOSIGNAL
        if self._line is not None:
            try:
                self._line.send(message, flags)
                return
            except OSError as error:
                if error.errno not in _GONE:
                    raise
        line = Socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            line.connect(self._address)
        except OSError:
            line.close()
            raise
        # As with the channel: closing is the kernel's job, without a warning at exit.
        atexit.register(line.detach)
        self.close()
        self._line = line
        line.send(message, flags)


#: One for each address.
_sender = lru_cache(maxsize=None)(_Sender)
