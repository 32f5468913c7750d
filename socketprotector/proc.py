"""Whether /proc may be asked: it is not mounted everywhere, and need not tell of our processes.

In a PID namespace with the /proc of another one its numbers mean other processes than to
kill(2).  `/proc/self` gives both away: proc(5).
"""

from __future__ import annotations

import os

#: What cannot be had without it, in the words of an error.
MISSING = "no /proc of this PID namespace is mounted"


def is_ours() -> bool:
    """Whether there is a /proc whose numbers are those of the processes that we see."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False
