"""connections(), each of which is passed to a process of a multiprocessing.Pool."""

from __future__ import annotations

import multiprocessing
import os

from socketprotector_client import Connection, connections


def answer(connection: Connection) -> None:
    with connection:
        connection.sendall(f"{os.getpid()} {connection.listener} {connection.peer[1]}\n".encode())


found = connections()
with multiprocessing.get_context("fork").Pool(1) as pool:
    for connection, _ in found:
        with connection:
            pool.apply(answer, (connection,))
