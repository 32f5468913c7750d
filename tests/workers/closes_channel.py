"""Serves one connection, then shuts down the channel that it shares, and lives on.

With `exit` it ends after that.
"""

import signal
import socket
import sys

from plain import CHANNEL, answer, say, take

say(b"READY=1")
taken = take()
assert taken
CHANNEL.shutdown(socket.SHUT_RD if "read" in sys.argv else socket.SHUT_RDWR)
with taken[1] as client:
    answer(client)
if "exit" not in sys.argv:
    signal.pause()
