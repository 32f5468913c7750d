"""A generic pre-fork server: a master, and children that block in accept(): `[pid] line`.

    prefork.py CHILDREN

TERM to the master: TERM to its children, and it waits for them.  TERM to a child: it ends after
the connection that it serves.  When the master is killed, its children go on.
"""

import os
import signal
import socket
import sys

_running = True


def _stop(*_: object) -> None:
    global _running
    _running = False
    raise InterruptedError


def _serve(listener: socket.socket) -> None:
    signal.signal(signal.SIGTERM, _stop)
    while _running:
        try:
            client, _ = listener.accept()
        except InterruptedError:
            break
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with client, client.makefile("rwb") as lines:
            for line in lines:
                lines.write(b"[%d] %s" % (os.getpid(), line))
                lines.flush()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        except InterruptedError:
            break


def main() -> None:
    listener = socket.socket(fileno=3)
    children = []
    for _ in range(int(sys.argv[1])):
        if (pid := os.fork()) == 0:
            try:
                _serve(listener)
            finally:
                os._exit(0)
        children.append(pid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.sigwait({signal.SIGTERM})
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    for pid in children:
        os.waitpid(pid, 0)


main()
