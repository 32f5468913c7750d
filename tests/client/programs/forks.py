"""Workers that fork: children that serve, that wait, and that share a Listener."""

from __future__ import annotations

import os
import signal
import sys
import threading

from socketprotector_client import Connection, Listener, connections, on_drain, serve

from tests.client.programs.talk import say, talk


def fork_and_talk(connection: Connection, peer: object) -> None:
    """Fork a child that waits to be killed, while this process goes on."""
    child = os.fork()
    if not child:
        say(f"child {os.getpid()}")
        signal.pause()
    talk(connection)
    os.waitpid(child, 0)


def accept_for_ever(listener: Listener) -> None:
    while True:
        connection, _ = listener.accept()
        talk(connection)


if sys.argv[1] == "child waits":
    serve(fork_and_talk, threads=2)
elif sys.argv[1] == "child serves":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for connection, _ in connections():
        if not os.fork():
            talk(connection)
            os._exit(0)
        connection.close()
elif sys.argv[1] == "prefork":
    shared = Listener(limit=1)
    on_drain(lambda: None)  # which has its thread, and a pipe to wake it
    shared.listen()
    child = os.fork()
    if not child:
        accept_for_ever(shared)
    say(f"child {child}")
    try:
        accept_for_ever(shared)
    finally:
        say(f"child ended {os.waitpid(child, 0)[1]}")
elif sys.argv[1] == "prepares":
    shared = Listener()
    say(f"threads {threading.active_count()}")
    shared.listen()
    say(f"threads {threading.active_count()}")
say("ended")
