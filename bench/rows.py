"""One function for each line of the table: what a connection costs through the protector.

Each starts what it needs, measures, and leaves nothing behind.  reload_rows.py has those
about reloads and generations.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import socketprotector_client

import socketprotector
from bench.figures import Figure, Scale, alternately, median, ratio
from bench.processes import (
    HANDED,
    CannotMeasure,
    Started,
    ask,
    cpu_ns,
    cpu_ticks,
    descendants,
    direct,
    generate,
    least,
    protector,
    resident_kib,
    stamps,
    switches,
)
from bench.steps import steps_us
from socketprotector.system.late_modules import PACK_AFTER_S

Seen = dict[str, Any]


def column(runs: list[Seen], name: str) -> list[float]:
    """Return one value of each run."""
    return [float(run[name]) for run in runs]


def middle_of(runs: list[Seen], name: str) -> float:
    """Return the median of one value over the runs."""
    return median(column(runs, name))


def nothing_failed(runs: list[Seen]) -> None:
    """Refuse a figure from runs in which connections failed: failing is quick."""
    failed = [run for run in runs if run["failed"]]
    if failed:
        raise CannotMeasure(f"connections failed: {failed[0]}")


def load(started: Started, at_once: int, seconds: float, *more: str) -> Seen:
    """Load it; beside what the generator saw, the CPU time of each process a connection."""
    workers = descendants(started.pid)
    before = {pid: cpu_ns(pid) for pid in (started.pid, *workers)}
    ticks, changed = cpu_ticks(started.pid), switches(started.pid)
    seen = generate(started.address, "-c", str(at_once), "-t", str(seconds), *more)
    count = max(1, seen["connections"])
    # A worker that a reload has ended meanwhile is left out; only rows without reloads use this.
    there = {started.pid, *descendants(started.pid)} & before.keys()
    spent_us = {pid: (cpu_ns(pid) - before[pid]) / count / 1e3 for pid in there}
    seen["parent_us"] = spent_us.pop(started.pid)
    seen["workers_us"] = sum(spent_us.values())
    seen["parent_ticks"] = cpu_ticks(started.pid) - ticks
    now = switches(started.pid)
    seen["slept"] = (now.voluntary - changed.voluntary) / count
    seen["preempted"] = (now.involuntary - changed.involuntary) / count
    return seen


def _rate(scale: Scale, client: str, *options: str) -> Figure:
    with protector() as forwarded, least() as bare, direct() as accepting:
        ways = (
            partial(load, each, 64, scale(3, 0.5), *options)
            for each in (forwarded, accepting, bare)
        )
        through, straight, barely = alternately(scale.rounds(9), *ways)
    nothing_failed(through + straight + barely)
    middle, words = ratio(column(through, "per_second"), column(straight, "per_second"))
    return Figure(
        f"connections/s forwarded / accepting directly, C=64, {client}",
        words,
        ">= 0.95",
        "1.0",
        middle >= 0.95,
        [
            f"{middle_of(through, 'per_second'):,.0f}/s forwarded, "
            f"{middle_of(straight, 'per_second'):,.0f}/s directly",
            _by_the_least(barely, straight, "per_second", "/s"),
            f"CPU a connection, forwarded: protector {middle_of(through, 'parent_us'):.1f} us, "
            f"worker {middle_of(through, 'workers_us'):.1f}, "
            f"generator {middle_of(through, 'own_cpu_us'):.1f}; "
            f"directly: worker {middle_of(straight, 'parent_us'):.1f}, "
            f"generator {middle_of(straight, 'own_cpu_us'):.1f}",
            f"the protector slept {middle_of(through, 'slept'):.2f} times a connection and "
            f"lost its core {middle_of(through, 'preempted'):.2f} times",
        ],
    )


def rate(scale: Scale) -> list[Figure]:
    """Connections/s against the same worker on an inherited listener."""
    return [_rate(scale, "ordinary client", "--plain"), _rate(scale, "leanest client")]


def handed(scale: Scale) -> list[Figure]:
    """Connections/s and p50 of a worker that was handed the listener, against its own."""
    figures = []
    with (
        protector(*HANDED) as passed,
        direct() as accepting,
    ):
        for name, at_once, seconds, what in (
            ("per_second", 64, 3, "connections/s, C=64"),
            ("p50_us", 1, 2, "p50 of one at a time"),
        ):
            run = partial(load, at_once=at_once, seconds=scale(seconds, 0.5))
            through, straight = alternately(
                scale.rounds(9), partial(run, passed), partial(run, accepting)
            )
            nothing_failed(through + straight)
            middle, words = ratio(column(through, name), column(straight, name))
            bound = ">= 0.97" if name == "per_second" else "<= 1.03"
            holds = middle >= 0.97 if name == "per_second" else middle <= 1.03
            here, there = middle_of(through, name), middle_of(straight, name)
            notes = [f"{here:,.1f} against {there:,.1f}"]
            title = f"--handoff listener: {what} / with a listener of its own"
            figures.append(Figure(title, words, bound, "1.00", holds, notes))
    return figures


def latency(scale: Scale) -> list[Figure]:
    """The time to the reply when there is one connection at a time, and where it goes."""
    with protector() as forwarded, least() as bare, direct() as accepting:

        def runs() -> list[list[Seen]]:
            one = partial(load, at_once=1, seconds=scale(2, 0.5))
            ways = [partial(one, each) for each in (forwarded, accepting, bare)]
            return alternately(scale.rounds(9), *ways)

        through, straight, barely = runs()
        told = stamps(forwarded.address)
        calls = system_calls(forwarded, scale)
        with cores_awake():
            awake, awake_straight, awake_barely = runs()
    nothing_failed(through + barely + straight + awake + awake_barely + awake_straight)
    middle, words = ratio(column(through, "p50_us"), column(straight, "p50_us"))
    awake_middle, awake_words = ratio(column(awake, "p50_us"), column(awake_straight, "p50_us"))
    longer_us = middle_of(through, "p50_us") - middle_of(straight, "p50_us")
    steps = steps_us()
    handed_us = told["wait_p50_ns"] / 1e3
    sent_us, taken_us = steps["sendmsg with the descriptor"], steps["recvmsg with the descriptor"]
    rest = (
        f"the other {longer_us - handed_us:.1f} us: the protector's loop, and accept there in "
        "place of accept in the worker; the close of the copy and the accept that finds nothing "
        "come after the handing over"
    )
    return [
        Figure(
            "p50 of one connection at a time / directly",
            words,
            "<= 1.25",
            "1.15",
            middle <= 1.25,
            [
                f"{middle_of(through, 'p50_us'):.1f} us against "
                f"{middle_of(straight, 'p50_us'):.1f}: {longer_us:+.1f} us "
                f"(p99 {middle_of(through, 'p99_us'):.0f} against "
                f"{middle_of(straight, 'p99_us'):.0f})",
                _by_the_least(barely, straight, "p50_us", " us"),
                f"seen in place, from the protector's accept to the worker's take: "
                f"{handed_us:.1f} us: sendmsg {sent_us:.1f}, recvmsg and making the socket "
                f"{taken_us:.1f}, so waking the worker {handed_us - sent_us - taken_us:.1f}",
                # That step alone can take longer than the whole difference: then nothing is left.
                *([rest] if longer_us > handed_us else []),
                "each step alone: "
                + "; ".join(f"{name} {us:.1f} us" for name, us in steps.items()),
                calls,
            ],
        ),
        Figure(
            "the same with no core asleep (a SCHED_IDLE loop on each)",
            awake_words,
            "<= 1.25",
            "1.15",
            awake_middle <= 1.25,
            [
                f"{middle_of(awake, 'p50_us'):.1f} us against "
                f"{middle_of(awake_straight, 'p50_us'):.1f}: what is left when the hop to the "
                "worker need not wake a sleeping core, which in a virtual machine takes long",
                _by_the_least(awake_barely, awake_straight, "p50_us", " us"),
            ],
        ),
    ]


def _by_the_least(barely: list[Seen], straight: list[Seen], name: str, unit: str) -> str:
    """Say what the minimal forwarder (forward.c) has beside accepting directly."""
    _, words = ratio(column(barely, name), column(straight, name))
    value = f"{middle_of(barely, name):,.1f}{unit}"
    return f"forwarded by the least that can (forward.c): {value}; / directly {words}"


@contextmanager
def cores_awake() -> Iterator[None]:
    """Keep every core busy with what gives way to all else."""
    idle = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile 1: pass"
    loops = [
        subprocess.Popen([sys.executable, "-S", "-c", idle]) for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def system_calls(started: Started, scale: Scale) -> str:
    """Count the protector's system calls a connection, by perf where there is one.

    Counting, not timing: perf and strace add 10 us to each call here.
    """
    perf = shutil.which("perf")
    if perf is None:
        return "system calls a connection: not counted, no perf"
    names = ("epoll_wait", "accept4", "sendmsg", "close", "read", "getsockname", "clock_gettime")
    events = ["raw_syscalls:sys_enter", *(f"syscalls:sys_enter_{name}" for name in names)]
    command = [perf, "stat", "-x", ",", "-e", ",".join(events), "-p", str(started.pid)]
    watching = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seen = generate(started.address, "-c", "1", "-t", str(scale(2, 1)))
    watching.send_signal(2)
    said = watching.communicate()[1]
    counts = {}
    for line in said.splitlines():
        fields = line.split(",")
        if len(fields) > 2 and fields[0].isdigit():
            counts[fields[2].rpartition("sys_enter")[2].strip("_") or "all"] = int(fields[0])
    if not counts:
        return f"system calls a connection: perf could not count them ({said.strip()[:80]})"
    each = ", ".join(
        f"{name} {count / seen['connections']:.2f}" for name, count in counts.items() if count
    )
    return f"the protector's system calls a connection: {each}"


def cpu(scale: Scale) -> list[Figure]:
    """The protector's own CPU time a connection."""
    with protector() as forwarded:
        plain, leanest, single = alternately(
            scale.rounds(5),
            lambda: load(forwarded, 64, scale(4, 0.5), "--plain"),
            lambda: load(forwarded, 64, scale(4, 0.5)),
            lambda: load(forwarded, 1, scale(2, 0.5)),
        )
    nothing_failed(plain + leanest + single)
    spent_us = middle_of(plain, "parent_us")
    tick_us = 1e6 / os.sysconf("SC_CLK_TCK")
    by_ticks = sum(column(plain, "parent_ticks")) * tick_us / sum(column(plain, "connections"))
    return [
        Figure(
            "protector's CPU per forwarded connection, C=64",
            f"{spent_us:.1f} us",
            "<= 15 us",
            "",
            spent_us <= 15,
            [
                "from /proc/PID/task/*/schedstat; what the kernel does for others on its time "
                "(packets on loopback, waking the worker) is in it",
                f"utime + stime of the same runs: {by_ticks:.1f} us "
                f"({sum(column(plain, 'parent_ticks')):.0f} ticks of {tick_us / 1e3:.0f} ms)",
                f"with the leanest client {middle_of(leanest, 'parent_us'):.1f} us; one at a time "
                f"(so a wake-up for each) {middle_of(single, 'parent_us'):.1f} us",
            ],
        )
    ]


#: The bound of an idle protector's memory: VmRSS and the memfd of kept code, 1000 kB a MB.
_MOST_MB = 14.2
#: What is switched on, and how: the worker, and options.
_FEATURES: dict[str, tuple[str, ...]] = {
    "no control socket": ("library", "--no-control"),
    "--guard": ("library", "--guard"),
    "a UNIX socket, too": ("library", "unix:idle.socket"),
    "--handoff listener": HANDED,
    "--health accept": ("library", "--health", "accept"),
    "--health http:": ("library", "--health", "http:/"),
    "--settle-check": ("library", "--settle", "1s", "--settle-check", "exit 0"),
    "--watch": ("library", "--watch", "/etc/hostname"),
    "--log-prefix (the relay)": ("library", "--log-prefix"),
    "--max-age": ("library", "--max-age", "1h"),
    "--ready accept": ("library", "--ready", "accept"),
}


def _idle_mbs() -> list[float]:
    """Return the memory of an idle protector, and of one with each feature, in MB.

    This is VmRSS and the memfd of its kept code, once that is compressed.
    """
    with ExitStack() as running:
        started = []
        for number, (mode, *options) in enumerate((("library",), *_FEATURES.values())):
            # Of protectors with one name, only the first has a control socket.
            named = protector(mode, "--name", f"idle-{number}", *options)
            started.append(running.enter_context(named))
        time.sleep(PACK_AFTER_S + 1.0)
        return [*map(_memory_mb, started)]


def _memory_mb(started: Started) -> float:
    # Under --guard the protector is the child that keeps code.
    for pid in (started.pid, *descendants(started.pid)):
        if kept := _kept_bytes(pid):
            return resident_kib(pid) / 1000 + kept / 1024 / 1000
    raise CannotMeasure("no process has a memfd of kept code")


def _kept_bytes(pid: int) -> int:
    """Return the size of the memfd in which a process keeps code (system/late_modules.py)."""
    folder = Path(f"/proc/{pid}/fd")
    found = [each for each in folder.iterdir() if "memfd:sp.late" in os.readlink(each)]
    return sum(each.stat().st_blocks * 512 for each in found)


def compiled() -> None:
    """Compile the packages, because they have bytecode when they are installed."""
    folders = (*socketprotector.__path__, *socketprotector_client.__path__)
    subprocess.run([sys.executable, "-m", "compileall", "-q", *folders], check=True)


def _memory(scale: Scale) -> Figure:
    """Measure an idle protector as installed, with bytecode, and the price of each feature."""
    # Without bytecode a process keeps 1.5 MB more: what compiling has left.
    compiled()
    rounds = [_idle_mbs() for _ in range(scale.rounds(8, 1))]
    plain, *others = ([*found] for found in zip(*rounds, strict=True))
    mb = median(plain)
    return Figure(
        "its memory with defaults: VmRSS and the code kept in a memfd (1000 kB a MB)",
        f"{mb:.2f} MB",
        f"<= {_MOST_MB} MB",
        "13 MB",
        mb <= _MOST_MB,
        [
            f"{name}: {median(found) - mb:+.2f} MB ({median(found) / mb:.3f} times)"
            for name, found in zip(_FEATURES, others, strict=True)
        ],
    )


def idle(scale: Scale) -> list[Figure]:
    """Wake-ups and memory of a protector for which nothing happens."""
    wait_s, watch_s = scale(20, 2), scale(30, 3)
    with protector() as started:
        load(started, 64, 0.5)
        ask(started.address)
        time.sleep(wait_s)
        before, cpu_before = switches(started.pid), cpu_ns(started.pid)
        time.sleep(watch_s)
        after, cpu_after = switches(started.pid), cpu_ns(started.pid)
        resident_mb = resident_kib(started.pid) / 1024
        threads = len(os.listdir(f"/proc/{started.pid}/task"))
    woken = sum(after) - sum(before)
    return [
        Figure(
            f"idle protector, {wait_s:.0f} s after the last event: wake-ups in {watch_s:.0f} s",
            str(woken),
            "0",
            "0",
            woken == 0,
            [f"{(cpu_after - cpu_before) / 1e3:.0f} us of CPU; {threads} thread(s)"],
        ),
        Figure(
            "its resident memory (VmRSS)",
            f"{resident_mb:.1f} MB",
            "<= 16 MB",
            "13 MB",
            resident_mb <= 16,
            ["after half a second of load; Server::Starter 14.7, gunicorn 25, circus 31"],
        ),
        _memory(scale),
    ]
