"""The worker of the rollout rows, on the client library: takes memory, or fails some connections.

    python -m bench.release FOLDER [--ballast MB] [--fails N]

It answers `ping`, and closes; it echoes all other lines.  FOLDER/met grows by a byte with each
connection, FOLDER/failed with each that it closes without an answer: every Nth.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
from pathlib import Path

from socketprotector_client import serve

THREADS = 4


def main() -> None:
    """Serve until the protector ends it."""
    parser = argparse.ArgumentParser(prog="python -m bench.release", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ballast", type=int, default=0, metavar="MB")
    parser.add_argument("--fails", type=int, default=0, metavar="N")
    given = parser.parse_args()
    ballast = bytearray(b"x") * (given.ballast * 1_000_000)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    met, failed = (os.open(given.folder / name, flags, 0o600) for name in ("met", "failed"))
    numbers, prefix = itertools.count(1), b"[%d] " % os.getpid()

    def handle(connection: socket.socket, address: object) -> None:
        if given.fails:
            os.write(met, b".")
            if next(numbers) % given.fails == 0:
                os.write(failed, b".")
                return
        while line := connection.recv(512):
            connection.sendall(prefix + line)
            if line == b"ping\n":
                return

    serve(handle, threads=THREADS)
    del ballast


if __name__ == "__main__":
    main()
