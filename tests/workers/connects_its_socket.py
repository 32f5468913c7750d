"""A release that fails: it connects its listening socket to itself, and exits.

So the socket neither listens nor hangs up.  First it waits to read the FIFO of its argument.
"""

import contextlib
import os
import socket
import sys

one = socket.socket(fileno=3)
one.setblocking(False)
os.write(2, b"waits\n")
open(sys.argv[1]).close()
while True:  # the protector may have had it listen again meanwhile
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        one.connect(one.getsockname())
    with contextlib.suppress(OSError):
        one.getpeername()
        sys.exit(3)
