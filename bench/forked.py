"""Workers that load once and serve in forked children, for the soak; each child has a child.

python -m bench.forked                                  lines, by serve(processes=3)
socketprotector-run --processes 3 bench.forked:wsgi     one HTTP request a connection
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess

from socketprotector_client import post_fork, serve

from bench.listening import wsgi

__all__ = ["wsgi"]

CHILDREN = 3
#: For each child: more than the idle clients of one.
THREADS = 128


@post_fork
def start_grandchild(number: int) -> None:
    """Start a process that only ends with its child, or at a signal."""
    atexit.register(subprocess.Popen(("sleep", "3600")).kill)


def talk(client: socket.socket, peer: object) -> None:
    """Answer each line."""
    try:
        for line in client.makefile("rb"):
            client.sendall(b"[%d] %s" % (os.getpid(), line))
    except OSError:
        pass  # the client is gone; nothing is owed to it


if __name__ == "__main__":
    serve(talk, threads=THREADS, processes=CHILDREN)
