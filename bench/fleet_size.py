"""python -m bench.fleet_size: how long a release takes on many hosts, and how far a fault comes.

Computed, not measured: batches one after the other, as deploy/ansible does them.  What a batch
costs is from releases to five hosts of namespaces (--measure does them again, and compares).

Ansible does a task on `forks` hosts at a time.  So a batch that is larger than that takes several
rounds, each as long as its longest task: the reload, with its --settle.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.fleet.hosts import Fleet


@dataclass(frozen=True)
class Costs:
    """What the machinery takes, in seconds; without --settle."""

    #: For a batch of one: the play's tasks one after the other, and a reload.
    batch_s: float = 4.0
    #: For each host, of one of the processors that all hosts of a batch share.
    host_s: float = 0.53
    #: How many those are.
    processors: int = 8
    #: Before the first batch, and behind the last.
    play_s: float = 0.6
    forks: int = 50

    def batch(self, hosts: int, settle_s: float) -> float:
        """How long a batch takes.

        The tasks of a host follow one another, and those of all hosts share the processors: what
        all of it takes there, and as much of one host's time as no other one can fill (R. L.
        Graham, Bounds for certain multiprocessing anomalies, 1966).  In rounds of `forks`.
        """
        rounds, left = divmod(hosts, self.forks)
        sizes = [self.forks] * rounds + ([left] if left else [])
        alone_s = self.batch_s * (1 - 1 / self.processors)
        return sum(
            settle_s + max(self.batch_s, self.host_s * size / self.processors + alone_s)
            for size in sizes
        )


@dataclass(frozen=True)
class Plan:
    """The sizes of batches: hosts, or shares of all as "10%"; the last one is repeated."""

    serial: tuple[int | str, ...]

    def batches(self, hosts: int) -> Iterator[int]:
        """Yield the sizes for so many hosts, as Ansible's `serial` has them."""
        left, at = hosts, 0
        while left > 0:
            each = self.serial[min(at, len(self.serial) - 1)]
            size = int(hosts * int(each[:-1]) / 100) if isinstance(each, str) else each
            size = min(max(size, 1), left)
            yield size
            left, at = left - size, at + 1

    def __str__(self) -> str:
        return ", ".join(map(str, self.serial))


@dataclass(frozen=True)
class Fault:
    """A fault of a release that has passed its start."""

    #: The share of hosts on which it shows.
    share: float
    #: After so many seconds of clients.
    after_s: float
    #: From then until the release is stopped, where --settle is over: an alert, and who reads it.
    noticed_s: float = 120.0


def duration_s(plan: Plan, hosts: int, settle_s: float, costs: Costs) -> float:
    """How long a good release takes."""
    return costs.play_s + sum(costs.batch(size, settle_s) for size in plan.batches(hosts))


def reached(plan: Plan, hosts: int, settle_s: float, fault: Fault, costs: Costs) -> float:
    """How many hosts have got a release when it is stopped, on average.

    Where it shows within --settle, its host takes it back and stops the play: behind that batch no
    host gets it.  Where it shows later, every batch that has begun until it was noticed gets it.
    """
    begins: list[float] = []
    until: list[int] = []  # so many hosts have it after this batch
    clock = 0.0
    sizes = list(plan.batches(hosts))
    for size in sizes:
        begins.append(clock)
        until.append(size + (until[-1] if until else 0))
        clock += costs.batch(size, settle_s)
    mean, none_yet = 0.0, 1.0
    for at, size in enumerate(sizes):
        first_here = none_yet * (1 - (1 - fault.share) ** size)
        none_yet -= first_here
        last = at
        if fault.after_s > settle_s:
            end = begins[at] + costs.batch(size, settle_s)
            stopped = end - settle_s + fault.after_s + fault.noticed_s
            last = max(place for place, begin in enumerate(begins) if begin <= stopped)
        mean += first_here * until[last]
    return mean + none_yet * hosts


def reached_without_batches(canaries: int, per_second: float, fault: Fault) -> float:
    """How many hosts have got a release on average where nothing waits but the first hosts.

    Those are looked at for longer than the fault needs to show; then the release goes to so many
    hosts a second, one after the other, until it has shown on one of them.
    """
    rest = 1 / fault.share + per_second * (fault.after_s + fault.noticed_s)
    return canaries + (1 - fault.share) ** canaries * rest


# -- what fleet_size.md shows ---------------------------------------------------------------------

HOSTS = 10_000
PLANS = (
    Plan((1, "10%", "50%")),
    Plan((1, 10, 100, 1000)),
    Plan((1, 10, 100, "5%")),
    Plan((1, "1%")),
    Plan((100, "5%")),
)
FAULTS = (
    ("every host, at once", Fault(1.0, 1)),
    ("1 %, after 5 s", Fault(0.01, 5)),
    ("1 %, after 30 s", Fault(0.01, 30)),
    ("0.1 %, after 5 s", Fault(0.001, 5)),
    ("1 %, after 10 minutes", Fault(0.01, 600)),
)
SETTLES_S = (10.0, 60.0)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def tables(costs: Costs) -> str:
    """Return both tables of the document."""
    wide = replace(costs, forks=500)
    lines = [
        "| `serial` | `--settle` | 50 forks | 500 forks | " +
        " | ".join(name for name, _ in FAULTS) + " |",
        "|" + "---|" * (4 + len(FAULTS)),
    ]  # fmt: skip
    for plan in PLANS:
        for settle_s in SETTLES_S:
            cells = [f"{plan}", f"{settle_s:g} s"]
            cells += [_minutes(duration_s(plan, HOSTS, settle_s, each)) for each in (costs, wide)]
            cells += [f"{reached(plan, HOSTS, settle_s, fault, wide):,.0f}" for _, fault in FAULTS]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -- five hosts -----------------------------------------------------------------------------------


class Release(NamedTuple):
    """One that is measured."""

    plan: Plan
    settle_s: float
    forks: int = 50


#: The first two tell what a batch and what a host costs; the others check the model.
MEASURED: tuple[Release, ...] = (
    Release(Plan((1,)), 1.0),
    Release(Plan((5,)), 1.0),
    Release(Plan((1, "10%", "50%")), 1.0),
    Release(Plan((1, 2)), 1.0),
    Release(Plan((1,)), 5.0),
    Release(Plan((5,)), 5.0),
    Release(Plan((1, 2)), 5.0),
    Release(Plan((5,)), 5.0, forks=2),
)
#: So that what else runs on the machine is no cost of a release; of Ansible and of all hosts.
NICE = -20
FIVE = 5


def fitted(
    one_by_one_s: float, all_at_once_s: float, empty_s: float, settle_s: float, processors: int
) -> Costs:
    """Return the costs by which five hosts take so long in batches of one, and in one batch.

    empty_s: a play that does nothing.
    """
    batch_s = (one_by_one_s - empty_s) / FIVE - settle_s
    at_once_s = all_at_once_s - empty_s - settle_s
    host_s = (at_once_s - batch_s * (1 - 1 / processors)) * processors / FIVE
    return Costs(batch_s, host_s, processors, empty_s)


#: Each is done so often, and the shortest counts: what else runs is no cost of a release.
ROUNDS = 2


def measure(say: Callable[[str], None]) -> int:
    """Release to five hosts, and compare; 1 if the model is off by more than 10 %."""
    from tests.fleet.hosts import fleet  # which needs namespaces, HAProxy, sshd and Ansible

    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    took: dict[Release, Took] = {}
    empties: list[Took] = []
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        for settle_s in sorted({each.settle_s for each in MEASURED}):
            made = Path(folder, f"{settle_s:g}")
            made.mkdir()
            options = ("--settle", f"{settle_s:g}s", "--settle-check", "http:/healthz")
            with fleet(made, *options) as five:
                version = "1"
                for each in [each for each in MEASURED if each.settle_s == settle_s] * ROUNDS:
                    version = "3" if version == "2" else "2"
                    batches = json.dumps({"batches": each.plan.serial})
                    found = _released(five, version, "-e", batches, "--forks", str(each.forks))
                    say(f"{each}: {found.seconds:.1f} s")
                    took[each] = min(found, took.get(each, found))
                empties += [_released(five, version, "--tags", "none") for _ in range(ROUNDS)]
    empty = min(empties)
    one_by_one, all_at_once = (took[each] for each in MEASURED[:2])
    host_s = (all_at_once.processor_s - empty.processor_s) / FIVE
    say(f"a host costs the control host {host_s:.2f} s of a processor")
    say(f"a play that does nothing took {empty.seconds:.2f} s")
    costs = fitted(
        one_by_one.seconds,
        all_at_once.seconds,
        empty.seconds,
        MEASURED[0].settle_s,
        os.cpu_count() or 1,
    )
    say(f"\n{costs}\n\n| `serial` | `--settle` | forks | measured | computed | |")
    say("|" + "---|" * 6)
    worst = 0.0
    for each, found in took.items():
        computed_s = duration_s(each.plan, FIVE, each.settle_s, replace(costs, forks=each.forks))
        off = computed_s / found.seconds - 1
        worst = max(worst, abs(off))
        say(
            f"| {each.plan} | {each.settle_s:g} s | {each.forks} | {found.seconds:.1f} s"
            f" | {computed_s:.1f} s | {off:+.0%} |"
        )
    return 1 if worst > 0.1 else 0


@dataclass(frozen=True, order=True)
class Took:
    """What a release took."""

    seconds: float
    #: Of Ansible and all that it has started.
    processor_s: float


def _released(five: Fleet, version: str, *words: str) -> Took:
    """Release."""
    begun_s = time.monotonic()
    process = five.releasing(version, *words)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said)
    return Took(time.monotonic() - begun_s, usage.ru_utime + usage.ru_stime)


def main() -> int:
    """Print the tables, or compare with five hosts."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet_size", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="release to five hosts, compare")
    if parser.parse_args().measure:
        return measure(lambda line: print(line, flush=True))
    print(tables(Costs()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
