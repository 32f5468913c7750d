"""The line of the table about a framework: what the drop-in Listener costs a web server."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import time
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from bench.figures import Figure, Scale, alternately, median, ratio
from bench.processes import HERE, CannotMeasure, Started, free_port
from bench.rows import Seen, column, load, middle_of, nothing_failed

AT_ONCE = 64
#: An HTTP/1.0 request: the server closes after its answer.
ONE = ("--plain", "--send", "GET / HTTP/1.0\r\n\r\n", "--expect", "\r\n\r\npong")
KEPT = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"


class _Web(Started):
    def _ask(self) -> None:
        _ask(self.address)


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def _ask(address: str) -> None:
    with _connect(address) as client:
        client.sendall(KEPT)
        _read(client)


def _read(client: socket.socket) -> None:
    reply = b""
    while not reply.endswith(b"\r\n\r\npong"):
        data = client.recv(4096)
        if not data:
            raise ConnectionResetError(f"only {reply!r} came back")
        reply += data


def _kept(started: Started, seconds: float) -> float:
    """Return requests/s over connections that stay open, all of them asked before any is read."""
    clients = [_connect(started.address) for _ in range(AT_ONCE)]
    try:
        begun_s = time.monotonic()
        rounds = 0
        while (spent_s := time.monotonic() - begun_s) < seconds:
            for client in clients:
                client.sendall(KEPT)
            for client in clients:
                _read(client)
            rounds += 1
        return rounds * AT_ONCE / spent_s
    finally:
        for client in clients:
            client.close()


def _compare(
    program: list[str], worker: list[str], scale: Scale
) -> tuple[list[Seen], list[Seen], list[float], list[float]]:
    """Return what was seen on the Listener and without it: one request a connection, and kept."""
    before, alone = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    with (
        _Web([*program, before, "--", *worker, "listener"], before, {}, []) as handed,
        _Web([*worker, alone], alone, {}, []) as listening,
    ):
        through, own = alternately(
            # Short ones: and the machine's speed changes from second to second.
            scale.rounds(26),
            lambda: load(handed, AT_ONCE, 0.2, *ONE),
            lambda: load(listening, AT_ONCE, 0.2, *ONE),
        )
        kept, own_kept = alternately(
            4,
            lambda: _kept(handed, 0.3),
            lambda: _kept(listening, 0.3),
        )
    return through, own, kept, own_kept


def framework(scale: Scale) -> list[Figure]:
    """Requests/s of uvicorn on the Listener, against uvicorn that listens by itself."""
    if find_spec("uvicorn") is None:
        raise CannotMeasure("uvicorn is not installed: pip install -e '.[dev]'")
    worker = [sys.executable, str(HERE / "http_worker.py")]
    program = os.environ.get("BENCH_PROTECTOR", "").split() or [
        str(Path(sysconfig.get_path("scripts")) / "SocketProtector"),
        "-f",
    ]
    # Two runs of one Python program differ by more than is sought, for as long as they live.
    starts = [_compare(program, worker, scale) for _ in range(scale.rounds(9, 1))]
    through, own, kept, own_kept = ([*chain(*one)] for one in zip(*starts, strict=True))
    nothing_failed(through + own)
    middle, words = ratio(column(through, "per_second"), column(own, "per_second"))
    _, kept_words = ratio(kept, own_kept)
    return [
        Figure(
            f"requests/s of uvicorn (asyncio) on the Listener / listening by itself, "
            f"one a connection, C={AT_ONCE}",
            words,
            ">= 0.97",
            "1.0",
            middle >= 0.97,
            [
                f"{middle_of(through, 'per_second'):,.0f}/s and "
                f"{middle_of(own, 'per_second'):,.0f}/s",
                f"CPU a request: protector {middle_of(through, 'parent_us'):.1f} us, worker "
                f"{middle_of(through, 'workers_us'):.1f}; by itself: worker "
                f"{middle_of(own, 'parent_us'):.1f}",
                f"keep-alive, {AT_ONCE} connections: {kept_words}; {median(kept):,.0f}/s and "
                f"{median(own_kept):,.0f}/s",
            ],
        )
    ]
