"""An unmodified server that accepts at the first of its listeners alone: accepts_first.py [GATE].

It answers `[pid] line` to one line of each client.  With GATE it reads only when this file exists.
TERM ends it at once.
"""

import os
import socket
import sys
import threading
import time


def answer(client: socket.socket) -> None:
    while len(sys.argv) > 1 and not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    with client, client.makefile("rb") as lines:
        client.sendall(b"[%d] %s" % (os.getpid(), lines.readline()))


def main() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    with socket.socket(fileno=3) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=answer, args=(client,), daemon=True).start()


main()
