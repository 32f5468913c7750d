"""Measure losses of tests/servers.md: python -m tests.servers.losses [NAME...] [--reloads N]."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from bench.processes import free_port
from tests.running import Protector, mark
from tests.scenarios.tools import spawned
from tests.servers.catalogue import SERVERS
from tests.web import Traffic


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.servers.losses", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SERVERS))
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--wait", default="0.005")
    parser.add_argument("--clients", type=int, default=8, help="of each kind")
    parser.add_argument("--late", type=float, default=2.0, help="seconds before a first request")
    given = parser.parse_args()
    for name in given.names:
        measure(name, given.reloads, given.wait, given.clients, given.late)


def measure(name: str, reloads: int, wait_s: str, clients: int, late_s: float) -> None:
    with tempfile.TemporaryDirectory(prefix="sp-") as folder, mark() as marks:
        os.environ["XDG_RUNTIME_DIR"] = folder
        protector = Protector(
            SERVERS[name].arguments(Path(folder), free_port), {**marks, "WAIT_S": wait_s}
        )
        began = time.monotonic()
        try:
            address = "127.0.0.1", protector.ready().port
            with (
                Traffic(address, clients=clients, pause_s=0.0) as single,
                Traffic(address, kept=True, clients=clients, pause_s=0.01) as kept,
                Traffic(address, clients=clients, pause_s=0.0, late_s=late_s) as late,
            ):
                single.wait_for(spawned(protector)[-1])
                for _ in range(reloads):
                    protector.reload()
                    single.wait_for(spawned(protector)[-1])
            protector.stop()
        finally:
            protector.end()
            if protector.process.returncode or os.environ.get("SHOW_LOG"):
                print(protector.log.text())
    used = os.times()
    cpu_s = used.children_user + used.children_system
    print(f"{name}: {time.monotonic() - began:.1f} s, CPU of all so far {cpu_s:.1f} s")
    for kind, seen in (("single", single.seen), ("kept", kept.seen), ("late", late.seen)):
        print(f"  {kind}: {seen.answers.total()} answers, ends {seen.ends}, {dict(seen.failures)}")


if __name__ == "__main__":
    main()
