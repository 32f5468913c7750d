"""An honest worker; a client that says `eat` makes it take 400 MB of memory."""

import os
import socket

from socketprotector_client import serve

eaten: list[bytes] = []


def handle(connection: socket.socket, address: object) -> None:
    with connection.makefile("rwb") as lines:
        for line in lines:
            if line == b"eat\n":
                eaten.append(os.urandom(1 << 20) * 400)
            lines.write(b"[%d] %s" % (os.getpid(), line))
            lines.flush()


serve(handle, threads=8)
