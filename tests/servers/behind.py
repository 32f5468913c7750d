"""Measure servers on a UNIX socket behind nginx and HAProxy: python -m tests.servers.behind.

A server is reloaded under load, gets a release that cannot be loaded, one that hangs and one that
answers 500; then its master is killed, the protector upgraded, the protector killed beside its
guard, and the guard killed.  After each of these a line says what the clients of that part have
seen.  With --results a later call measures the parts that are not in the file.  --whole measures
every cell of the table: both transports, both proxies, with and without kept connections.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bench.processes import free_port
from tests.running import Protector, mark, wait_gone
from tests.scenarios.adopting import kill_protector, protector_pid, revived, upgrade
from tests.scenarios.operating import pass_time
from tests.scenarios.tools import spawned
from tests.servers.behind_results import Cell, Count, add, read, tables
from tests.servers.catalogue import BEHIND, WAIT_S, Release
from tests.servers.proxies import PROXIES, proxied
from tests.unit.ctl.conftest import run
from tests.web import Traffic

UNIX, TCP, TCP_NODELAY = "unix", "tcp", "tcp nodelay"
#: Children that load the application themselves have the release of before by then.
LOADS_S = 3.0
#: How long clients go on after a part, so that its failures are counted in it.
GOES_ON_S = 1.5
#: They answer on a kept connection for as long as it is busy, so their generations end late.
NEVER_DONE = ("node", "starman")
#: What --whole leaves out, as server and number of clients with kept connections: Starlet keeps
#: none, and Starman needs a process for each.
NOT_KEPT = (("starlet", 4), ("starlet", 64), ("starman", 64))
#: The part that has a reload after each other part.
BETWEEN = "reloads between"


class Parts:
    """Counts what the clients have seen in each part, and prints it."""

    def __init__(self, cell: Cell, traffic: Traffic) -> None:
        self.counts: dict[str, Count] = {}
        self._cell, self._seen = cell, traffic.seen
        self._answers, self._failures = 0, Counter[str]()

    def ends(self, name: str) -> None:
        """Take what clients have seen since the part before."""
        answers, failures = self._seen.answers.total(), Counter(self._seen.failures)
        new = failures - self._failures
        count = Count(answers - self._answers + new.total(), new)
        print(f"{self._cell}: {name}: {count.text} {dict(new) or ''}", flush=True)
        self.counts[name] = self.counts.get(name, Count()) + count
        self._answers, self._failures = answers, failures


def measure(cell: Cell, given: argparse.Namespace, wanted: Sequence[str]) -> None:
    """Start one server behind one proxy, and go through the wanted parts."""
    nodelay = cell.transport == TCP_NODELAY
    server = replace(BEHIND[cell.server], listener="?nodelay=1" if nodelay else "")
    with tempfile.TemporaryDirectory(prefix="sp-") as text, mark() as marks:
        folder = Path(text)
        os.environ["XDG_RUNTIME_DIR"] = text
        path = folder / "web.sock" if cell.transport == UNIX else None
        options = ["--guard", "--start-timeout", "8s", "--kill-timeout", "1s"]
        if cell.kept and cell.server in NEVER_DONE:
            options += ["--drain-timeout", "10s"]
        words, release = server.deployed(
            folder, free_port, *options, *given.option, ready=("--ready", "http:/"), unix=path
        )
        daemon = Protector(words, {**marks, "WAIT_S": WAIT_S})
        try:
            daemon.ready()
            server_at = f"unix:{path}" if path else f"127.0.0.1:{daemon.port}"
            port = free_port()
            with (
                proxied(cell.proxy, server_at, port, folder, kept=cell.kept, retries=given.retries),
                Traffic(
                    ("127.0.0.1", port), kept=True, clients=cell.clients, pause_s=0.005
                ) as traffic,
            ):
                traffic.wait_for(spawned(daemon)[-1])
                counted = Parts(cell, traffic)
                try:
                    go_through(daemon, release, traffic, counted, cell, given, wanted)
                finally:
                    if given.results:
                        add(given.results, cell, counted.counts)
            if os.environ.get("SHOW_LOG"):
                print((folder / "proxy.log").read_text(), (folder / "error.log").read_text())
            stop(daemon)
        finally:
            daemon.end()
            if sys.exc_info()[0] or os.environ.get("SHOW_LOG"):
                print(daemon.log.text())


def stop(daemon: Protector) -> None:
    """Stop the protector, whose guard may have been killed."""
    if daemon.process.poll() is None:
        daemon.stop()
    else:
        pid = protector_pid(daemon)
        os.kill(pid, signal.SIGTERM)
        assert wait_gone([pid]) == [], daemon.log.text()


def names_of_parts(reloads: int) -> list[str]:
    """Return the parts in their order."""
    broken = ("cannot be loaded", "hangs", "answers 500")
    return [
        f"{reloads} reloads",
        *broken,
        "master killed",
        "USR2",
        "protector killed",
        "guard killed",
    ]


def go_through(
    daemon: Protector,
    release: Release,
    traffic: Traffic,
    counted: Parts,
    cell: Cell,
    given: argparse.Namespace,
    wanted: Sequence[str],
) -> None:
    """Go through the wanted parts."""

    def serves() -> None:
        if cell.kept:  # connections that are never idle stay with the old one
            traffic.wait_for_answers(100)
        else:
            traffic.wait_for(spawned(daemon)[-1])

    def reload(*words: str) -> None:
        # Not by a signal to the process that we started: that is the guard.
        done = run("reload", *words)
        assert done.status == 0, f"{done}\n{daemon.log.text()}"
        serves()

    def many() -> None:
        for _ in range(given.reloads - 1):
            reload()
        reload("--drained")

    def refused(spoil: Callable[[], None]) -> None:
        pass_time(LOADS_S)
        spoil()
        done = run("reload")
        assert done.status == 3, f"{done}\n{daemon.log.text()}"
        print(f"  {done.err.strip()}")
        release.answers(200)

    def master_killed() -> None:
        os.kill(spawned(daemon)[-1], signal.SIGKILL)
        serves()

    def upgraded() -> None:
        assert "event=resumed" in upgrade(daemon)

    def protector_killed() -> None:
        revived(daemon, kill_protector(daemon))

    def guard_killed() -> None:
        daemon.process.kill()
        daemon.log.wait_for("event=guard-died")

    acts: tuple[Callable[[], None], ...] = (
        many,
        lambda: refused(release.breaks),
        lambda: refused(release.hangs),
        lambda: refused(lambda: release.answers(500)),
        master_killed,
        upgraded,
        protector_killed,
        guard_killed,
    )
    for name, act in zip(names_of_parts(given.reloads), acts, strict=True):
        if name in wanted:
            act()
            pass_time(GOES_ON_S)
            counted.ends(name)
            if act is not many:
                reload("--drained")
                counted.ends(BETWEEN)


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells that the command line asks for."""
    one = (TCP_NODELAY if given.nodelay else TCP) if given.tcp else UNIX
    transports = (UNIX, TCP) if given.whole else (one,)
    proxies = tuple(PROXIES) if given.whole else (given.proxy,)
    keeps = (False, True) if given.whole else (given.kept,)
    counts = [int(each) for each in given.clients.split(",")]
    for transport, proxy, kept, clients in product(transports, proxies, keeps, counts):
        for name in given.names or BEHIND:
            if not (given.whole and kept and (name, clients) in NOT_KEPT):
                yield Cell(name, transport, proxy, kept, clients)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.servers.behind", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BEHIND))
    parser.add_argument("--proxy", choices=list(PROXIES), default="nginx")
    parser.add_argument("--kept", action="store_true", help="it keeps connections to the server")
    parser.add_argument("--retries", action="store_true", help="it sends such a request again")
    parser.add_argument("--clients", default="4,64")
    parser.add_argument(
        "--whole", action="store_true", help="both proxies, kept and not, UNIX, TCP"
    )
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--tcp", action="store_true", help="a port instead of a path, to compare")
    parser.add_argument("--nodelay", action="store_true", help="with --tcp: TCP_NODELAY")
    parser.add_argument("--part", action="append", metavar="WORD", help="only parts with it")
    parser.add_argument("--option", action="append", default=[], help="one more of ours")
    parser.add_argument("--results", type=Path, metavar="FILE", help="add to it what is not there")
    parser.add_argument("--table", action="store_true", help="print the tables of --results, only")
    given = parser.parse_args()
    if given.table:
        print(tables(read(given.results)), end="")
        return 0
    status = 0
    for cell in cells(given):
        there = read(given.results).get(cell, {}) if given.results else {}
        wanted = [
            part
            for part in names_of_parts(given.reloads)
            if part not in there and (not given.part or any(word in part for word in given.part))
        ]
        try:
            if wanted:
                measure(cell, given, wanted)
        except (AssertionError, subprocess.TimeoutExpired):
            traceback.print_exc()
            print(f"{cell}: FAILED", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
