"""Lets the kernel drop descriptors in messages of other processes, so that they are not received.

A received descriptor can be of any kind.  Closing it may wait for the sender (a file of FUSE).
If no descriptor is free, the rest of the message is in an unknown state.  So we read every such
message without room for descriptors, and the kernel drops them.

When the kernel drops the last copy of a TCP socket with SO_LINGER, it waits as long as the sender
has set, even for a socket in the queue of a UNIX socket.  A signal ends this wait, so a timer sends
a signal.

Source: unix(7); socket(7), SO_LINGER; setitimer(2); sk_stream_wait_close() in Linux.
"""

from __future__ import annotations

import _signal as signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: The time until the signal.  Reading a message without such a socket is faster, so usually no
#: signal comes.
_FIRST_S = 0.001
_SO_PASSRIGHTS = 83
_UNREAD_BYTES = 65_536
#: The interval of further signals, and so the limit for each further message.
_NEXT_S = 0.0001


@contextmanager
def dropping() -> Iterator[None]:
    """Limit the kernel's wait to a millisecond for each message whose descriptors it drops."""
    handler = signal.signal(signal.SIGALRM, _interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, _FIRST_S, _NEXT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def refuse_descriptors(sock: socket.socket) -> None:
    """Make the kernel refuse messages with descriptors, if it can (Linux 6.16).

    Connections inherit this from their listening socket.
    """
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def _interrupt(number: int, frame: object) -> None:
    """Do nothing: the signal itself ends the wait."""


def drop_unread(sock: socket.socket) -> None:
    """Remove all messages from a UNIX socket, and refuse further messages.

    Call this before a close.  Otherwise another process with a copy, such as the guard, would wait.
    """
    try:
        sock.shutdown(socket.SHUT_RD)
        # With credentials an empty message can be distinguished from end of file.
        packets = sock.type != socket.SOCK_STREAM
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, packets)
        with dropping():
            while True:
                data, _, flags, _ = sock.recvmsg(_UNREAD_BYTES, 0, socket.MSG_DONTWAIT)
                if not data and not (packets and flags & socket.MSG_CTRUNC):
                    return
    except OSError:
        return  # a datagram socket is empty


def close_unread(sock: socket.socket) -> None:
    """Close a UNIX socket, with all messages that were not read."""
    drop_unread(sock)
    sock.close()
