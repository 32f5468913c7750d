"""Make a listener non-blocking, then become a command.  Usage: nonblocking.py FD COMMAND [ARG...]

For nginx: what it inherits by NGINX it takes as it is, and on a blocking listener a worker that
was second to a connection waits in accept(2) for the next one, deaf to all else.
"""

from __future__ import annotations

import os
import sys

os.set_blocking(int(sys.argv[1]), False)
os.execvp(sys.argv[2], sys.argv[2:])
