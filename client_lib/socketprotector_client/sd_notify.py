"""Tell the protector (or systemd, where there is none) how this process is doing.

One datagram to NOTIFY_SOCKET, sent with MSG_DONTWAIT: news are never worth
blocking for, nor failing for, so a full or vanished receiver changes nothing.

Source: man 3 sd_notify.
"""

from __future__ import annotations

import os
import socket

from . import wire
from .system import Socket


def notify(*lines: str, **fields: object) -> bool:
    """Send lines such as "READY=1", and fields (`status="warm"` becomes STATUS=warm).

    All of them travel in one datagram.  Never blocks and never raises because
    of the receiver.  Returns True if the datagram was handed to the kernel,
    False if there is no NOTIFY_SOCKET or nobody takes it now.
    """
    address = os.environ.get(wire.ENV_NOTIFY, "")
    if not address.startswith(("/", "@")):
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    words = [*lines, *(f"{name.upper()}={value}" for name, value in fields.items())]
    # A line end within a value would be read as the next assignment.
    message = "\n".join(" ".join(word.splitlines()) for word in words)
    try:
        with Socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.sendto(
                message.encode("utf-8", "replace"),
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
                address,
            )
    except OSError:
        return False
    return True
