"""Descriptors that other processes send along with their messages: never received.

A descriptor that is received can be of any kind.  Closing it may wait for its sender (a file of
FUSE), and where our own run out the rest of its message is left in an unknown state.  So every
such message is read without room for descriptors, and the kernel drops them.

As it drops the last copy of a TCP socket with SO_LINGER, the kernel waits for as long as the
sender has set; also where that socket waits in the queue of a UNIX socket.  A signal ends this
wait, so a timer sends one.

Source: unix(7); socket(7), SO_LINGER; setitimer(2); sk_stream_wait_close() in Linux.
"""

from __future__ import annotations

import _signal as signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: Far longer than a message without such a socket takes, so that usually no signal comes.
_FIRST_S = 0.001
_SO_PASSRIGHTS = 83
_UNREAD_BYTES = 65_536
#: The limit starts again with each message that is read.
_NEXT_S = 0.0001


@contextmanager
def dropping() -> Iterator[None]:
    """Bound what the kernel waits for as it drops descriptors: a millisecond each time."""
    handler = signal.signal(signal.SIGALRM, _interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, _FIRST_S, _NEXT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def refuse_descriptors(sock: socket.socket) -> None:
    """Make the kernel refuse messages with descriptors, if it can (Linux 6.16).

    For a listening socket this holds for its connections, too.
    """
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def _interrupt(number: int, frame: object) -> None:
    """Do nothing: the signal has ended the wait."""


def drop_unread(sock: socket.socket) -> None:
    """Remove all that waits in a UNIX socket, and let nothing more come.

    To be called before it is closed: where another process has a copy, such as the guard, that
    process would wait.
    """
    try:
        sock.shutdown(socket.SHUT_RD)
        # Only with this does an empty message differ from the end.
        packets = sock.type != socket.SOCK_STREAM
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, packets)
        with dropping():
            while True:
                data, _, flags, _ = sock.recvmsg(_UNREAD_BYTES, 0, socket.MSG_DONTWAIT)
                if not data and not (packets and flags & socket.MSG_CTRUNC):
                    return
    except OSError:
        return  # a datagram socket has no more
