"""A server that takes its time to start, and says nothing when it has.

    slow.py SECONDS      accepts from descriptor 3 after so many seconds

As an application that connects to its database and imports much.  Answers lines as `[pid] line`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

#: A listening socket is there from the beginning; nobody accepts from it yet.
FD = int(os.environ.get("SERVER_STARTER_PORT", "=3").rpartition("=")[2])


def main() -> None:
    listening = socket.socket(fileno=FD)
    listening.setblocking(True)
    time.sleep(float(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True:
        one, _ = listening.accept()
        with one:
            line = one.recv(4096)
            if line:  # else it was only asked whether it accepts
                one.sendall(b"[%d] %b" % (os.getpid(), line))


if __name__ == "__main__":
    main()
