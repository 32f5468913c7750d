"""The lines of the table about a machine of which another process takes what it can get."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bench.figures import Figure, Scale, alternately, ratio
from bench.many_rows import CPU
from bench.processes import Started, cpu_ns, direct, least, protector
from bench.rows import Seen, column, load, middle_of, nothing_failed

BURN = "while True: pass"


@contextmanager
def one_group() -> Iterator[bool]:
    """Have all that is started from here on in one cgroup; whether that could be had.

    Else the kernel's autogroups share the processors out by session, and our worker, which leads
    one of its own, gets as much as all the others together.
    """
    group = CPU / f"bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield False
        return
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield True
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (CPU / "cgroup.procs").write_text(pid)
        group.rmdir()


@contextmanager
def burning() -> Iterator[int]:
    """Keep one core busy, whichever the scheduler gives; the pid of the process that does."""
    burning = subprocess.Popen([sys.executable, "-S", "-c", BURN])
    try:
        yield burning.pid
    finally:
        burning.kill()
        burning.wait()


def _told(what: str, runs: list[Seen], straight: list[Seen]) -> str:
    """Say what was seen of one that forwards, beside accepting directly."""
    _, rate = ratio(column(runs, "per_second"), column(straight, "per_second"))
    _, given = ratio(column(runs, "per_cpu_second"), column(straight, "per_cpu_second"))
    _, half = ratio(column(runs, "p50_us"), column(straight, "p50_us"))
    _, longest = ratio(column(runs, "max_us"), column(straight, "max_us"))
    slept = middle_of(runs, "slept")
    return (
        f"{what}: rate {rate}; connections for a second of processor time of all together, hog "
        f"included, {given}; p50 {half}, longest {longest}; CPU a connection: itself "
        f"{middle_of(runs, 'parent_us'):.1f} us, worker {middle_of(runs, 'workers_us'):.1f}, "
        f"generator {middle_of(runs, 'own_cpu_us'):.1f}; woken {slept:.2f} times a connection"
        + (f" ({1 / slept:.0f} at each)" if slept else "")
    )


def _beside_a_hog(scale: Scale, client: str, least_ratio: float, *options: str) -> Figure:
    def run(started: Started) -> Seen:
        before = cpu_ns(hog_pid)
        seen = load(started, 64, scale(1, 0.3), *options)
        each_us = seen["parent_us"] + seen["workers_us"] + seen["own_cpu_us"]
        spent_us = each_us * seen["connections"] + (cpu_ns(hog_pid) - before) / 1e3
        seen["per_cpu_second"] = seen["connections"] / spent_us * 1e6
        return seen

    with (
        one_group() as grouped,
        protector() as ours,
        least() as bare,
        direct() as accepting,
        burning() as hog_pid,
    ):
        through, barely, straight = alternately(
            scale.rounds(21), lambda: run(ours), lambda: run(bare), lambda: run(accepting)
        )
    nothing_failed(through + barely + straight)
    middle, words = ratio(column(through, "per_second"), column(straight, "per_second"))
    _, beside = ratio(column(through, "per_second"), column(barely, "per_second"))
    return Figure(
        f"beside a hog: connections/s forwarded / accepting directly, C=64, {client}",
        words,
        f">= {least_ratio}" if least_ratio else "",
        "",
        middle >= least_ratio if least_ratio else None,
        [
            _told("forwarded by us", through, straight),
            _told("by the least that can (forward.c)", barely, straight),
            f"rate of ours / of the least: {beside}",
            f"directly: {middle_of(straight, 'per_second'):,.0f}/s, CPU a connection: worker "
            f"{middle_of(straight, 'parent_us'):.1f} us, "
            f"generator {middle_of(straight, 'own_cpu_us'):.1f}",
            "hog, generator, worker and protector have the same weight (one cgroup)"
            if grouped
            else "no cgroup could be made: sessions, not processes, have the same weight",
        ],
    )


def hog(scale: Scale) -> list[Figure]:
    """Connections/s while another process burns one of the cores, not bound to either."""
    return [
        _beside_a_hog(scale, "ordinary client", 0.92, "--plain"),
        _beside_a_hog(scale, "leanest client", 0.0),  # the least that can forward has 0.9 there
    ]
