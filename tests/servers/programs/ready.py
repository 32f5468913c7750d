"""Say that this worker can be given connections: sd_notify(3), for programs that do not say it."""

from __future__ import annotations

import os
import socket


def ready() -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address and "SAYS_NOTHING" not in os.environ:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", address.replace("@", "\0", 1))
