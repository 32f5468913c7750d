"""A worker that answers each line with its pid, for the rows about a start.

starts.py bare      takes from the channel by recvmsg, with the fewest modules
starts.py library   serve() of the client library
"""

from __future__ import annotations

import os
import sys


def library() -> None:
    """Serve by the client library."""
    from socketprotector_client import serve

    serve(lambda connection, _: connection.sendall(answer(connection.recv(512))))


def bare() -> None:
    """Take one connection after the other."""
    import socket

    channel = socket.socket(fileno=int(os.environ["SOCKETPROTECTOR_CHANNEL"]))
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)
    while True:
        record, rights, _, _ = channel.recvmsg(16, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        if not record:
            return
        with socket.socket(fileno=int.from_bytes(rights[0][2], sys.byteorder)) as connection:
            connection.sendall(answer(connection.recv(512)))


def answer(line: bytes) -> bytes:
    return b"[%d] %s" % (os.getpid(), line)


if __name__ == "__main__":
    {"bare": bare, "library": library}[sys.argv[1]]()
