"""A release that fails: it has new clients come to its own socket, until one waits there.

It says so, waits to read the FIFO that it is given, and exits; it accepts none.
"""

import array
import contextlib
import os
import select
import socket
import struct
import sys

SO_ATTACH_REUSEPORT_CBPF = 51
one = socket.socket(fileno=3)
while not select.select([one], [], [], 0.001)[0]:
    for place in (1, 0):  # it does not know its own
        code = array.array("B", struct.pack("HBBI", 0x06, 0, 0, place))
        program = struct.pack("HP", 1, code.buffer_info()[0])
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)
os.write(2, b"taken\n")
open(sys.argv[1]).close()
sys.exit(3)
