"""Measure servers on a UNIX socket behind nginx and HAProxy: python -m tests.servers.behind.

A server is reloaded under load, gets a release that cannot be loaded, one that hangs and one that
answers 500; then its master is killed, the protector upgraded, and the protector killed beside its
guard.  After each of these a line says what the clients of that part have seen.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.processes import free_port
from tests.running import Protector, mark
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.operating import pass_time
from tests.scenarios.tools import spawned
from tests.servers.catalogue import BEHIND, WAIT_S, Release
from tests.servers.proxies import PROXIES, proxied
from tests.unit.ctl.conftest import run
from tests.web import Traffic

#: Children that load the application themselves have the release of before by then.
LOADS_S = 3.0


class Part:
    """Prints what the clients have seen since the part before."""

    def __init__(self, row: str, traffic: Traffic) -> None:
        self._row, self._seen = row, traffic.seen
        self._answers, self._failures = 0, Counter[str]()

    def ends(self, name: str) -> None:
        """Say what clients have seen since the part before."""
        answers, failures = self._seen.answers.total(), Counter(self._seen.failures)
        new = failures - self._failures
        of = answers - self._answers + new.total()
        print(f"{self._row} {name}: {new.total()} of {of} {dict(new) or ''}", flush=True)
        self._answers, self._failures = answers, failures


def measure(name: str, given: argparse.Namespace, clients: int) -> None:
    """Start one server behind one proxy, and go through all parts."""
    server = BEHIND[name]
    with tempfile.TemporaryDirectory(prefix="sp-") as text, mark() as marks:
        folder = Path(text)
        os.environ["XDG_RUNTIME_DIR"] = text
        path = None if given.tcp else folder / "web.sock"
        options = ("--guard", "--start-timeout", "8s", "--kill-timeout", "1s")
        words, release = server.deployed(
            folder, free_port, *options, *given.option, ready=("--ready", "http:/"), unix=path
        )
        daemon = Protector(words, {**marks, "WAIT_S": WAIT_S})
        row = f"{name}, {given.proxy}, {'kept' if given.kept else 'single'}, {clients}:"
        try:
            daemon.ready()
            server_at = f"unix:{path}" if path else f"127.0.0.1:{daemon.port}"
            port = free_port()
            with (
                proxied(
                    given.proxy, server_at, port, folder, kept=given.kept, retries=given.retries
                ),
                Traffic(("127.0.0.1", port), kept=True, clients=clients, pause_s=0.005) as traffic,
            ):
                traffic.wait_for(spawned(daemon)[-1])
                parts(daemon, release, traffic, Part(row, traffic), given)
            if os.environ.get("SHOW_LOG"):
                print((folder / "proxy.log").read_text(), (folder / "error.log").read_text())
            daemon.stop()
        finally:
            daemon.end()
            if daemon.process.returncode or os.environ.get("SHOW_LOG"):
                print(daemon.log.text())


def parts(
    daemon: Protector,
    release: Release,
    traffic: Traffic,
    part: Part,
    given: argparse.Namespace,
) -> None:
    """Go through those that are wanted."""

    def serves() -> None:
        if given.kept:  # connections that are never idle stay with the old one
            traffic.wait_for_answers(100)
        else:
            traffic.wait_for(spawned(daemon)[-1])

    def reload() -> None:
        # Not by a signal to the process that we started: that is the guard.
        done = run("reload")
        assert done.status == 0, f"{done}\n{daemon.log.text()}"
        serves()

    def many() -> None:
        for _ in range(given.reloads):
            reload()

    def refused(spoil: Callable[[], None]) -> None:
        pass_time(LOADS_S)
        spoil()
        done = run("reload")
        assert done.status == 3, f"{done}\n{daemon.log.text()}"
        print(f"  {done.err.strip()}")
        release.answers(200)
        reload()

    def master_killed() -> None:
        os.kill(spawned(daemon)[-1], signal.SIGKILL)
        serves()
        traffic.wait_for_answers(100)
        pass_time(1.5)

    def upgraded() -> None:
        assert "event=resumed" in upgrade(daemon)
        reload()

    def killed() -> None:
        revived(daemon, kill_protector(daemon))
        reload()

    each: dict[str, Callable[[], None]] = {
        f"{given.reloads} reloads": many,
        "cannot be loaded": lambda: refused(release.breaks),
        "hangs": lambda: refused(release.hangs),
        "answers 500": lambda: refused(lambda: release.answers(500)),
        "master killed": master_killed,
        "USR2": upgraded,
        "protector killed": killed,
    }
    for name, act in each.items():
        if not given.part or any(word in name for word in given.part):
            began = time.monotonic()
            act()
            part.ends(f"{name} ({time.monotonic() - began:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.servers.behind", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BEHIND))
    parser.add_argument("--proxy", choices=list(PROXIES), default="nginx")
    parser.add_argument("--kept", action="store_true", help="it keeps connections to the server")
    parser.add_argument("--retries", action="store_true", help="it sends such a request again")
    parser.add_argument("--clients", default="4,64")
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--tcp", action="store_true", help="a port instead of a path, to compare")
    parser.add_argument("--part", action="append", metavar="WORD", help="only parts with it")
    parser.add_argument("--option", action="append", default=[], help="one more of ours")
    given = parser.parse_args()
    for name in given.names or list(BEHIND):
        for clients in map(int, given.clients.split(",")):
            measure(name, given, clients)


if __name__ == "__main__":
    main()
