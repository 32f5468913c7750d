"""A release that fails: it binds its listening socket to a device that is not there, and exits.

With `stays` it says so, and is never ready.  With `signed` it has every client sign with a key
(TCP_MD5SIG_EXT), says so, and accepts none.  With the path of a FIFO it waits to read that, shuts
the socket down instead, and is never ready.
"""

import os
import socket
import struct
import sys
import time

one = socket.socket(fileno=3)
BIND_TO_IF_INDEX, NO_DEVICE = 62, 12_345
if sys.argv[1:] == ["stays"]:
    one.setsockopt(socket.SOL_SOCKET, BIND_TO_IF_INDEX, NO_DEVICE)
    os.write(2, b"waits\n")
    time.sleep(1000)
if sys.argv[1:] == ["signed"]:
    who = struct.pack("H", one.family).ljust(128, b"\0")
    one.setsockopt(socket.IPPROTO_TCP, 32, who + struct.pack("BBHi80s", 1, 0, 3, 0, b"key"))
    os.write(2, b"waits\n")
    time.sleep(1000)
for gate in sys.argv[1:]:
    os.write(2, b"waits\n")
    open(gate).close()
    one.shutdown(socket.SHUT_RDWR)
    time.sleep(1000)
one.setsockopt(socket.SOL_SOCKET, BIND_TO_IF_INDEX, NO_DEVICE)
sys.exit(3)
