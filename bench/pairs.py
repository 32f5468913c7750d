"""python -m bench.pairs COMMIT: what connections and reloads cost now / in an earlier commit.

Both protectors run side by side, with the client library of the same commit in their workers, and
are measured in turn, A B B A.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.earlier import ROOT, extract
from bench.figures import Bystanders, Figure, Scale, alternately, machine, ratio, table
from bench.processes import HANDED, Started, cpu_ns, protector, resident_kib
from bench.reload_rows import one_reload
from bench.rows import Seen, column, load, middle_of, nothing_failed

#: By the name of the mode: the words for protector().
MODES = {"connection": ("library",), "listener": HANDED}
#: Of the loads: clients at a time, seconds, options of the generator, and the compared values.
LOADS = {
    "C=64, ordinary client": (64, 3, ("--plain",), ("per_second", "parent_us", "p99_us")),
    "C=64, leanest client": (64, 3, (), ("per_second", "parent_us")),
    "one at a time": (1, 2, (), ("p50_us", "parent_us")),
}
#: The old generation has ended by then, whose workers accept for another second.
ENDS_S = 1.5
UNITS = {"per_second": "connections/s", "parent_us": "CPU of the protector, us"}


@contextmanager
def started(code: Path, *words: str) -> Iterator[Started]:
    """Start a protector by the code in a folder."""
    path = f"{code}:{code / 'client_lib'}"
    command = f"env PYTHONPATH={path} {sys.executable} -P -m socketprotector -f"
    os.environ["BENCH_PROTECTOR"] = command
    with protector(*words) as one:
        yield one


def reload(each: Started) -> Seen:
    """Reload once, until the old generation has ended."""
    before = cpu_ns(each.pid)
    seen: Seen = dict(one_reload(each))
    time.sleep(ENDS_S)
    seen["added"] = seen["whole"] - seen["own"]
    seen["cpu_ms"] = (cpu_ns(each.pid) - before) / 1e6
    return seen


def of_mode(mode: str, earlier: Path, scale: Scale) -> Iterator[Figure]:
    """Yield the figures of one mode."""
    with started(ROOT, *MODES[mode]) as new, started(earlier, *MODES[mode]) as old:

        def figure(what: str, name: str, taken: list[list[Seen]]) -> Figure:
            now, before = taken
            words = ratio(column(now, name), column(before, name))[1]
            notes = [f"{middle_of(now, name):,.2f} against {middle_of(before, name):,.2f}"]
            return Figure(f"{mode}: {what}", words, notes=notes)

        def pairs(rounds: int, take: Callable[[Started], Seen]) -> list[list[Seen]]:
            return alternately(scale.rounds(rounds), partial(take, new), partial(take, old))

        for title, (at_once, seconds, options, names) in LOADS.items():
            taken = pairs(
                9,
                lambda each: load(each, at_once, scale(seconds, 0.3), *options),  # noqa: B023
            )
            nothing_failed([*taken[0], *taken[1]])
            for name in names:
                if name != "parent_us" or mode == "connection":
                    yield figure(f"{UNITS.get(name, name)}, {title}", name, taken)
        taken = pairs(20, reload)
        yield figure("HUP to first served, less the worker's own start, ms", "added", taken)
        yield figure("CPU of the protector for a reload, ms", "cpu_ms", taken)
        kib = resident_kib(new.pid), resident_kib(old.pid)
        yield Figure(
            f"{mode}: resident memory afterwards",
            f"{kib[0] / kib[1]:.3f}",
            notes=[f"{kib[0] / 1000:.2f} MB against {kib[1] / 1000:.2f}"],
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pairs", description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("--quick", action="store_true", help="short runs: does it run at all?")
    given = parser.parse_args()
    where, bystanders, figures = machine(), Bystanders(), list[Figure]()
    with tempfile.TemporaryDirectory(prefix="bench-") as text:
        earlier = Path(text) / "earlier"
        earlier.mkdir()
        os.environ["XDG_RUNTIME_DIR"] = text
        extract(given.commit, earlier)
        for mode in MODES:
            for figure in of_mode(mode, earlier, Scale(given.quick)):
                print(f"{figure.what}: {figure.value}", file=sys.stderr)
                figures.append(figure)
    others = f"others kept {bystanders.cores():.2f} cores busy meanwhile"
    print(f"{where} / commit {given.commit}; {others}\n\n{table(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
