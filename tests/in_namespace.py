"""Execute a command as root of a user namespace that shares everything else with the host.

    in_namespace.py COMMAND [ARG...]     says "here" on stdout, goes on at a line on stdin

The process that has started it writes the maps meanwhile (tests/namespaces.py).
"""

import ctypes
import os
import sys

CLONE_NEWUSER = 0x10000000

libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(CLONE_NEWUSER):
    sys.exit(os.strerror(ctypes.get_errno()))
os.write(1, b"here\n")
os.read(0, 1)
if os.path.getsize("/proc/self/uid_map") or open("/proc/self/uid_map").read():  # noqa: SIM115
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
