"""What the workers here that use no client library have in common: a few lines of the protocol."""

import os
import socket
import sys

CHANNEL = socket.socket(fileno=int(os.environ["SOCKETPROTECTOR_CHANNEL"]))


def say(message: bytes) -> None:
    """Tell the protector something, such as READY=1."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(message, os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


def take(flags: int = 0) -> tuple[bytes, socket.socket] | None:
    """Wait for a connection and return (header, socket); None at end of file."""
    header, control, _, _ = CHANNEL.recvmsg(16, socket.CMSG_LEN(4), flags)
    if not header:
        return None
    return header, socket.socket(fileno=int.from_bytes(control[0][2], sys.byteorder))


def answer(client: socket.socket) -> None:
    """Answer each line with `[pid] line` until the client has closed."""
    while data := client.recv(65536):
        client.sendall(b"[%d] %s" % (os.getpid(), data))
