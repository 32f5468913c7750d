"""Serves many connections: prints each line, whatever comes of that, and answers `[pid] line`."""

import os
import socket
import threading

from plain import say, take


def serve(client: socket.socket) -> None:
    with client, client.makefile("rb") as lines:
        for line in lines:
            try:
                os.write(1, line)
            except OSError:
                pass  # the disk is full: a service goes on
            client.sendall(b"[%d] %s" % (os.getpid(), line))


say(b"READY=1")
while taken := take():
    client = socket.socket(fileno=taken[1].detach())
    threading.Thread(target=serve, args=(client,)).start()
