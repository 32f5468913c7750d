"""A worker on the client library that does what a line says; other lines come back.

`fail`: the handler raises.  `hang`: nothing is done any more, by the whole process if it has one
thread.  `grow`: 64 MiB more are kept.  `deaf` as an argument: ABRT is ignored.  `--fork`:
a child takes connections as well.
"""

import os
import signal
import socket
import sys
import threading

from socketprotector_client import Listener, serve

kept: list[bytearray] = []


def handle(connection: socket.socket, address: object) -> None:
    with connection.makefile("rwb") as lines:
        for line in lines:
            if line == b"fail\n":
                raise RuntimeError("as I was told")
            if line == b"hang\n":
                threading.Event().wait()
            if line == b"grow\n":
                kept.append(bytearray(b"x" * 2**26))
            lines.write(b"[%d] %s" % (os.getpid(), line))
            lines.flush()


if "deaf" in sys.argv:
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
if "--fork" in sys.argv:
    listener = Listener()
    listener.listen()
    child = os.fork()
    while True:
        try:
            connection, address = listener.accept()
        except OSError:
            break
        with connection:
            handle(connection, address)
    os._exit(0)
serve(handle, threads=int(sys.argv[1]))
