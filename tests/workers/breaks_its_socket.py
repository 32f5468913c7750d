"""A release that fails: it binds its listening socket to a device that is not there, and exits.

With `stays` it says so, and is never ready.  With the path of a FIFO it waits to read that, shuts
the socket down instead, and is never ready.
"""

import os
import socket
import sys
import time

one = socket.socket(fileno=3)
BIND_TO_IF_INDEX, NO_DEVICE = 62, 12_345
if sys.argv[1:] == ["stays"]:
    one.setsockopt(socket.SOL_SOCKET, BIND_TO_IF_INDEX, NO_DEVICE)
    os.write(2, b"waits\n")
    time.sleep(1000)
for gate in sys.argv[1:]:
    os.write(2, b"waits\n")
    open(gate).close()
    one.shutdown(socket.SHUT_RDWR)
    time.sleep(1000)
one.setsockopt(socket.SOL_SOCKET, BIND_TO_IF_INDEX, NO_DEVICE)
sys.exit(3)
