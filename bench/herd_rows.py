"""The lines of the table about many workers: how many are woken, and whose turn it is."""

from __future__ import annotations

import itertools
import os
import select
import socket
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figure, Scale, alternately, median, ratio
from bench.processes import HERE, Started, cpu_ns, descendants, free_port, switches

#: What is measured, and beside how many workers.
WAYS = ("connections", "blocking", "serve", "listener", "aserve")
COUNTS = (2, 8, 32, 128)
#: Frameworks that wait in ways of their own, and which of them are asked for a page.
FRAMEWORKS = ("trio", "anyio", "anyio-trio", "gevent", "gunicorn", "gthread", "waitress")
WEB, PREFORK = ("gunicorn", "gthread", "waitress"), ("gunicorn", "gthread")
#: By hand: as it was, and what does not pass through.
OTHERS = ("every", "nested")
#: At once this many workers, each connection held so long: what they can serve is known.
LOADED, HELD_MS = 8, 20.0
LOADS = (0.2, 0.6, 1.0)
#: So many clients come together.  With a few hundred connections in all chance would decide.
CLUMPS = (1, 16)


class _Herd(Started):
    request = b""

    def _ask(self) -> None:
        self.served_by()

    def served_by(self) -> int:
        """Connect; return the pid that served, once the connection has ended.  Raises OSError."""
        host, _, port = self.address.rpartition(":")
        with socket.create_connection((host, int(port)), 30) as client:
            if self.request:
                client.sendall(self.request)
            said = b""
            while data := client.recv(256):
                said += data
        if not said:
            raise ConnectionResetError("not served")
        return int(said.rpartition(b"[")[2].partition(b"]")[0])


class _WebHerd(_Herd):
    request = b"GET / HTTP/1.0\r\n\r\n"


@dataclass(frozen=True)
class Woken:
    """What connections, one at a time, cost all workers together, every thread counted; each."""

    wake_ups: float
    cpu_us: float
    protector_wake_ups: float


@contextmanager
def herd(way: str, workers: int, held_ms: float = 0.0) -> Iterator[_Herd]:
    """Start so many workers, and let them serve until all wait in their way."""
    address = f"127.0.0.1:{free_port()}"
    program = os.environ.get("BENCH_PROTECTOR", "").split() or [
        str(Path(sysconfig.get_path("scripts")) / "SocketProtector"),
        "-f",
    ]
    worker = [sys.executable, str(HERE / "herd.py"), way, str(held_ms)]
    processes = "1" if way in PREFORK else str(workers)
    command = [*program, "--workers", processes, address, "--", *worker]
    kind = _WebHerd if way in WEB else _Herd
    with kind(command, address, {"HERD_PROCESSES": str(workers)}, []) as started:
        time.sleep(1.0 if way in PREFORK else 0.0)  # it serves when the first of them does
        for _ in range(5):
            started.served_by()
        yield started


def one_by_one(started: _Herd, count: int) -> Woken:
    """Connect so often, each time after a pause in which all go to sleep again.

    Less what they wake for without any: many servers look around once a second.
    """
    time.sleep(0.2)
    workers = descendants(started.pid)
    idle, begun_s = sum(switches(pid).voluntary for pid in workers), time.monotonic()
    time.sleep(1.0)
    before = sum(switches(pid).voluntary for pid in workers)
    idle_per_s = (before - idle) / (time.monotonic() - begun_s)
    begun_s = time.monotonic()
    cpu, own = sum(map(cpu_ns, workers)), switches(started.pid).voluntary
    for _ in range(count):
        started.served_by()
        time.sleep(0.004)
    time.sleep(0.2)
    by_clock = idle_per_s * (time.monotonic() - begun_s)
    return Woken(
        (sum(switches(pid).voluntary for pid in workers) - before - by_clock) / count,
        (sum(map(cpu_ns, workers)) - cpu) / count / 1e3,
        (switches(started.pid).voluntary - own) / count,
    )


def wake_ups(way: str, workers: int, scale: Scale) -> Figure:
    """Count how often threads of so many idle workers wake, beside those of a single one."""
    count = int(scale(100, 30))
    with ExitStack() as stack:
        many = stack.enter_context(herd(way, workers))
        single = stack.enter_context(herd(way, 1))
        together, alone = alternately(
            scale.rounds(3), lambda: one_by_one(many, count), lambda: one_by_one(single, count)
        )
    woken = median([each.wake_ups for each in together])
    of_one = median([each.wake_ups for each in alone])
    _, cpu = ratio([each.cpu_us for each in together], [each.cpu_us for each in alone])
    bound = None if way in OTHERS else 1.2 if way in WAYS else 2.0
    # A web server sleeps for the request, too, and its threads wait for one another.
    chosen = woken - of_one + 1 if way in WEB else woken
    return Figure(
        f"{way}, {workers} idle workers: wake-ups of all their threads a connection"
        + (", less those of a single worker, and 1" if way in WEB else ""),
        f"{chosen:.2f}",
        "" if bound is None else f"<= {bound}",
        "1.0",
        None if bound is None else chosen <= bound,
        [
            f"{woken:.2f} in all; of a single worker's threads: {of_one:.2f}",
            f"all workers' CPU a connection: "
            f"{median([each.cpu_us for each in together]):.0f} us, {cpu} of a single one's",
            f"the protector woke {median([each.protector_wake_ups for each in together]):.2f} "
            "times a connection",
        ],
    )


def shares(started: Started, per_second: float, count: int, at_once: int) -> Counter[int]:
    """Let so many come at this rate, several at once, in any order; count by worker."""
    host, _, port = started.address.rpartition(":")
    found: Counter[int] = Counter()
    epoll = select.epoll()
    clients: dict[int, tuple[socket.socket, list[bytes]]] = {}
    begun_s, come = time.monotonic(), 0
    while come < count or clients:
        due_s = begun_s + come / per_second - time.monotonic() if come < count else 1.0
        if due_s <= 0.0:
            for _ in range(at_once):
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex((host, int(port)))
                clients[client.fileno()] = client, []
                epoll.register(client, select.EPOLLIN)
            come += at_once
        for fd, _ in epoll.poll(max(0.0, due_s)):
            client, said = clients[fd]
            if data := client.recv(256):
                said.append(data)
            else:
                epoll.unregister(fd)
                client.close()
                del clients[fd]
                found[int(b"".join(said).partition(b"]")[0][1:])] += 1
    epoll.close()
    return found


def fairness(way: str, scale: Scale) -> list[Figure]:
    """The largest share of one worker, where so much of what they can do is asked of them."""
    figures = []
    with herd(way, LOADED, HELD_MS) as started:
        for part, at_once in itertools.product(LOADS, CLUMPS):
            per_second = part * LOADED / HELD_MS * 1e3
            found = shares(started, per_second, int(scale(4000, 480)), at_once)
            sorts = sorted(found.values())
            largest = max(found.values()) / found.total() * LOADED
            figures.append(
                Figure(
                    f"{way}, {LOADED} workers, {part:.0%} load, {at_once} at once: "
                    "the busiest one's share / its due",
                    f"{largest:.2f}",
                    "<= 1.5",
                    "1.0",
                    largest <= 1.5,
                    [f"{found.total()} connections, {HELD_MS:.0f} ms each: {sorts}"],
                )
            )
    return figures


def herds(scale: Scale) -> list[Figure]:
    """Wake-ups and CPU a connection beside idle workers, and the shares of loaded ones."""
    figures = []
    for way in WAYS:
        figures += [wake_ups(way, count, scale) for count in COUNTS]
    figures += [wake_ups(way, 32, scale) for way in (*FRAMEWORKS, *OTHERS)]
    for way in ("connections", "listener"):
        figures += fairness(way, scale)
    return figures
