"""python -m bench.hostile SOCKET: what no client should do to a control socket, until it is killed.

98 clients follow events and never read them, one asks for the status and never reads it, one
sends garbage without end (and reads the answers, or it would soon have to wait).  Says
`there` when all are connected.
"""

from __future__ import annotations

import socket
import sys

FOLLOWERS = 98
_GARBAGE = b"garbage, and a lot of it\n" * 400


def connected(path: str) -> socket.socket:
    """Return a new connection."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def main(path: str) -> None:
    """Connect all, and go on for ever."""
    followers = [connected(path) for _ in range(FOLLOWERS)]
    for each in followers:
        each.sendall(b'{"v":1,"command":"events"}\n')
        each.recv(4096)
    deaf = connected(path)
    deaf.setblocking(False)
    loud = connected(path)
    print("there", flush=True)
    while True:
        try:
            deaf.send(b'{"v":1,"command":"status"}\n' * 100)
        except BlockingIOError:
            pass
        except OSError:  # ended, for it has asked nothing for long
            deaf.close()
            deaf = connected(path)
            deaf.setblocking(False)
        loud.sendall(_GARBAGE)
        answered = 0
        while answered < _GARBAGE.count(b"\n"):
            answered += loud.recv(65536).count(b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
