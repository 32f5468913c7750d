"""A worker whose child shares its descriptors; the child tells how it fares."""

from __future__ import annotations

import os
import signal
import sys

from socketprotector_client import Connection, Listener, connections, serve

from tests.client.programs.talk import say, talk


def fork_and_talk(connection: Connection, peer: object) -> None:
    """Fork a child that waits to be killed, while this process serves on."""
    child = os.fork()
    if not child:
        say(f"child {os.getpid()}")
        signal.pause()
    talk(connection)


def prefork() -> None:
    """Two processes that accept from one Listener made before the fork."""
    listener = Listener()
    listener.listen()
    child = os.fork()
    while True:
        connection, _ = listener.accept()
        talk(connection)
        if child and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG):
            child = 0


if sys.argv[1] == "serve":
    serve(fork_and_talk, threads=4)
elif sys.argv[1] == "connections":
    for connection, _ in connections():
        if not os.fork():
            talk(connection)
            os._exit(0)
        connection.close()
else:
    prefork()
