"""Messages about this process's state to the protector, or to systemd without a protector.

Messages are datagrams to NOTIFY_SOCKET, whose queue holds few unread messages
(net.unix.max_dgram_qlen, 10).  A message must neither block nor fail the caller.  But a full queue
must lose no message: most are sent only once, and without READY=1 a start fails.
So a thread waits for room instead of the caller, and ends when all messages are sent.

One connected socket stays open.  It can send WATCHDOG=1 even without a free descriptor, and after
the path was removed or is out of reach (chroot).

Source: man 3 sd_notify; unix(7).
"""

from __future__ import annotations

import atexit
import errno
import os
import socket
from functools import lru_cache

from . import fork_hook, wire
from .system import Socket, allocate_lock, start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Optional, Sequence, Tuple

#: The errors after the receiver is gone; another one may have taken its place.
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)
_TURN = ("WATCHDOG=1",)
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)


def notify(*lines: str, **fields: object) -> bool:
    """Send lines such as "READY=1", and fields (`status="warm"` becomes STATUS=warm).

    A field whose value is None is left out.

    All lines and fields go out in one datagram.  Never blocks, and raises no error if sending
    fails.  Returns True if the kernel has taken the datagram.  Returns False without
    NOTIFY_SOCKET or a receiver, with nothing to send, or while the receiver's queue is full.
    If the queue is full, a thread sends the message later, unless a newer message with the same
    names replaces it.
    """
    address = os.environ.get(wire.ENV_NOTIFY, "")
    if not address.startswith(("/", "@")):
        return False
    if lines == _TURN and not fields:
        from .worker import current  # imported late: it imports this module

        seat = current().seat
        if seat is not None:  # the parent watches its children, and the protector the parent
            seat.turn()
            return True
    given = [(name, value) for name, value in fields.items() if value is not None]
    words = [*lines, *(f"{name.upper()}={value}" for name, value in given)]
    if not words:
        return False
    # The receiver would read a line end within a value as the next assignment.
    return _sender(address).send([" ".join(word.splitlines()) for word in words])


class _Sender:
    """The sender to one address."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._line: Optional[socket.socket] = None
        self.after_fork_in_child()
        fork_hook.register(self)

    def after_fork_in_child(self) -> None:
        # The parent's waiting messages and its thread are not the child's.
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
        """Send a message now, or later if the queue is full; return whether it was sent."""
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
            # Goes behind the waiting messages, and replaces a message with the same names.
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
        """Send the waiting messages in order, waiting for room.  Runs in a thread."""
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
        """Send a message; connect again if the receiver was replaced.  Raises OSError."""
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
        # Detached at exit, so that Python does not warn; the kernel closes it.
        atexit.register(line.detach)
        self.close()
        self._line = line
        line.send(message, flags)


#: Returns the one sender for an address.
_sender = lru_cache(maxsize=None)(_Sender)
