"""An honest worker on the client library: `[pid] line` for each line, many at once.

echo.py [THREADS [grandchild]]
"""

import os
import socket
import sys

from socketprotector_client import serve


def handle(connection: socket.socket, address: object) -> None:
    with connection.makefile("rwb") as lines:
        for line in lines:
            lines.write(b"[%d] %s" % (os.getpid(), line))
            lines.flush()


if "grandchild" in sys.argv:
    os.posix_spawnp("sleep", ["sleep", "3600"], os.environ)
serve(handle, threads=int(sys.argv[1]) if len(sys.argv) > 1 else 32)
