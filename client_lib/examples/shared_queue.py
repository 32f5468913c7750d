"""An echo server whose children share one queue: `[pid] line`; `quit` ends the conversation.

Usage: shared_queue.py [ADDRESS [CHILDREN]].  USR1 to the first process forks one more child.
"""

import contextlib
import os
import signal
import sys

from socketprotector_client import SocketServer


def talk(client, peer):
    with contextlib.suppress(ConnectionError):  # the client has left
        for line in client.makefile("rb"):
            client.sendall(b"[%d] %s" % (os.getpid(), line))
            if line.strip() == b"quit":
                return  # SocketServer closes the connection; this child takes the next one


address, children = (sys.argv[1:] + ["8888", "1"][len(sys.argv) - 1 :])[:2]
if not children.isdecimal() or int(children) == 0:
    sys.exit("usage: shared_queue.py [ADDRESS [CHILDREN]]")
with SocketServer(address) as server:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # until run() handles it
    print("pid", os.getpid(), "listens on", *server.listeners, flush=True)
    server.run(talk, int(children))
