"""Answers each connection with what this worker sees of itself, as one line of JSON."""

import os


def descriptors() -> dict[str, str]:
    """What is open; taken before anything else, so that it is what was inherited."""
    found = {}
    folder = os.open("/proc/self/fd", os.O_RDONLY)
    for fd in os.listdir(folder):
        if int(fd) != folder:
            try:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
            except FileNotFoundError:
                pass  # the one that lists them
    os.close(folder)
    return found


seen: dict[str, object] = {"descriptors": descriptors()}

import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402

from plain import say, take  # noqa: E402

with open("/proc/self/status", encoding="ascii") as file:
    status = dict(line.rstrip("\n").split(":\t", 1) for line in file)
umask = os.umask(0)
os.umask(umask)
seen |= {
    "pid": os.getpid(),
    "session": os.getsid(0),
    "group": os.getpgid(0),
    "uids": os.getresuid(),
    "gids": os.getresgid(),
    "groups": os.getgroups(),
    "umask": umask,
    "directory": os.getcwd(),
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "blocked": status["SigBlk"],
    "ignored": status["SigIgn"],
    "environment": dict(os.environ),
    "argv": sys.argv,
}
say(b"READY=1")
while taken := take():
    header, client = taken
    with client:
        client.sendall(json.dumps(seen | {"header": list(header)}).encode() + b"\n")
