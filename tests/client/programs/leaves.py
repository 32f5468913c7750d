"""A Listener in a server that handles SIGTERM; says what it reads, and when the signal comes.

leaves.py SECONDS [MILLISECONDS]: how long a client that has connected may take to begin, and how
long its next words may take in a TLS handshake.
"""

from __future__ import annotations

import select
import signal
import sys

from socketprotector_client import Connection, Listener, connection, draining, exit_after_drain

from tests.client.programs.talk import say

exit_after_drain._FIRST_REQUEST_S = float(sys.argv[1])
exit_after_drain._POLL_S = 0.001
connection._HANDSHAKE_MS = int(sys.argv[2]) if len(sys.argv) > 2 else 0

ended = False


def on_term(*_: object) -> None:
    global ended
    ended = True
    say("TERM")


signal.signal(signal.SIGTERM, on_term)
listener = Listener()
listener.setblocking(False)
listener.listen()
clients: list[Connection] = []
said = False
while not ended:
    for one in select.select([listener, *clients], [], [], 1)[0]:
        if one is not listener:
            say(one.recv(100).decode().strip() or "closed")
            continue
        try:
            clients.append(listener.accept()[0])
            say("taken")
        except BlockingIOError:
            if draining() and not said:
                said = True
                say("leaving")
