"""python -m bench [NAME...] [--quick]: measure and print the table of figures."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable

from bench.control_rows import control, everything, scoreboard, status
from bench.figures import Bystanders, Figure, Scale, machine, table
from bench.framework_rows import framework
from bench.herd_rows import herds
from bench.hog_rows import hog
from bench.list_rows import listing
from bench.many_rows import quota, workers
from bench.mode_rows import modes
from bench.processes import CannotMeasure
from bench.reload_rows import draining, handed_reloads, reloads, switch
from bench.rollout_rows import canary, returned, rolling
from bench.rows import cpu, handed, idle, latency, rate
from bench.spread_rows import spread
from bench.start_rows import start
from bench.stdio_rows import stdio
from bench.survive_rows import handed_survive, handed_upgrade, lasting, survive, upgrade
from bench.wait_rows import wait

ROWS: dict[str, Callable[[Scale], list[Figure]]] = {
    "rate": rate,
    "latency": latency,
    "reloads": reloads,
    "switch": switch,
    "start": start,
    "idle": idle,
    "cpu": cpu,
    "draining": draining,
    "upgrade": upgrade,
    "survive": survive,
    "lasting": lasting,
    "list": listing,
    "scoreboard": scoreboard,
    "status": status,
    "control": control,
    "everything": everything,
    "handed": handed,
    "handed-reloads": handed_reloads,
    "handed-upgrade": handed_upgrade,
    "handed-survive": handed_survive,
    "stdio": stdio,
    "framework": framework,
    "workers": workers,
    "quota": quota,
    "herd": herds,
    "hog": hog,
    "modes": modes,
    "wait": wait,
    "rolling": rolling,
    "canary": canary,
    "returned": returned,
    "spread": spread,
}


def main() -> int:
    """Run the rows asked for; 1 if a bound does not hold or a figure could not be taken."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder  # control sockets go there
        return _run()


def _run() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS) + "; all")
    parser.add_argument("--quick", action="store_true", help="short runs: does it run at all?")
    given = parser.parse_args()
    unknown = set(given.names) - set(ROWS)
    if unknown:
        parser.error(f"{' '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # 10,000 connections are held open

    figures: list[Figure] = []
    where = machine()
    bystanders = Bystanders()
    for name in given.names or ROWS:
        begun_s = time.monotonic()
        print(f"{name} ... ", end="", file=sys.stderr, flush=True)
        try:
            taken = ROWS[name](Scale(given.quick))
        except (CannotMeasure, OSError) as error:  # one row's fault must not lose the others
            said = str(error).strip().splitlines()
            taken = [Figure(name, "not measured", holds=False, notes=[said[0], said[-1]])]
        print(f"{time.monotonic() - begun_s:.0f} s", file=sys.stderr)
        for each in taken:
            print(f"    {each.what}: {each.value}", file=sys.stderr)
        figures += taken
    quick = "; short runs" if given.quick else ""
    print(f"{where}; others kept {bystanders.cores():.2f} cores busy meanwhile{quick}\n")
    print(table(figures))
    return 1 if any(figure.holds is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
