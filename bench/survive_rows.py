"""One function for each line of the table that is about surviving: upgrades, kills, long drains."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench.figures import Figure, Scale, alternately, median, ratio
from bench.processes import (
    HANDED,
    CannotMeasure,
    Started,
    ask,
    cpu_ns,
    protector,
    resident_kib,
    switches,
)
from bench.reload_rows import GENERATIONS, pile_up, still_there
from bench.rows import column, compiled, load, middle_of, nothing_failed

LIMIT_S = 20.0
#: A client that never sleeps takes from the new program the core it starts on.
LIGHT_S = 0.0005
LASTING = 10_000
#: What connections may add to the protector's memory: nothing, but for the noise of its heap.
NOISE_KIB = 512


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _spread(values: Sequence[float]) -> str:
    return (
        f"{quantile(values, 0.99):.0f} ms (median {median(values):.0f}, longest {max(values):.0f})"
    )


# -- upgrade in place ---------------------------------------------------------------


class _Log:
    """Counts events in the protector's log as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def count(self, event: str) -> int:
        return self._path.read_text().count(f" event={event} ")

    def last_span_ms(self, first: str, last: str) -> float:
        """Return the time between the last two such lines, by the log's own clock."""
        times = {
            event: float(found[-1][0]) * 60_000 + float(found[-1][1]) * 1000
            for event in (first, last)
            if (
                found := re.findall(
                    rf"T\d\d:(\d\d):([\d.]+)Z \w+ event={event} ", self._path.read_text()
                )
            )
        }
        return (times[last] - times[first]) % 3_600_000


def _longest_gap_ms(address: str, lasts_s: float, log: _Log | None = None, begun: int = 0) -> float:
    """Return the longest time between two answers while asking one by one.

    Ends after `lasts_s`, or a moment after the log reports a finished upgrade.
    """
    longest_s, last_s = 0.0, time.monotonic()
    until_s = last_s + lasts_s
    looked_s = last_s
    while last_s < until_s:
        ask(address)
        now_s = time.monotonic()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
        if log is not None and now_s - looked_s > 0.05:
            looked_s = now_s
            if log.count("resumed") > begun:
                log, until_s = None, now_s + 0.1
        time.sleep(LIGHT_S)
    if log is not None:
        raise CannotMeasure(f"no upgrade within {lasts_s:g} s of USR2")
    return longest_s * 1e3


#: What the new program does before it reads the state, and the time after each part.
_PARTS = """
import time
times = [time.monotonic_ns()]
import gc
gc.disable()
from socketprotector import __main__
from socketprotector.system import late_modules, late_stdlib
for name in (*late_stdlib.UNUSED, "re"):
    late_stdlib.defer(name)
times.append(time.monotonic_ns())
late_modules.keep()
times.append(time.monotonic_ns())
from socketprotector.daemon import resident
from socketprotector.daemon.delivery.queue import queue_delivery
print(*times, time.monotonic_ns())
"""


def _parts_ms() -> tuple[float, float, float]:
    """Return the time of an interpreter's start, of all imports, and of keeping late modules."""
    begun = time.monotonic_ns()
    done = subprocess.run([sys.executable, "-P", "-c", _PARTS], check=True, stdout=subprocess.PIPE)
    started, first, kept, last = map(int, done.stdout.split())
    return (started - begun) / 1e6, (first - started + last - kept) / 1e6, (kept - first) / 1e6


def upgrade(scale: Scale) -> list[Figure]:
    """For how long no client is accepted while the protector's program is replaced."""
    return _upgrade(scale, ("library",), "", None)


def handed_upgrade(scale: Scale) -> list[Figure]:
    """The same where the workers accept: they go on meanwhile."""
    return _upgrade(scale, HANDED, "--handoff listener: ", 50)


def _upgrade(
    scale: Scale, words: Sequence[str], prefix: str, most_ms: float | None
) -> list[Figure]:
    """most_ms: None: 30, or 10 more than the floor: an interpreter's start and the imports."""
    compiled()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with protector(*words, "--log-file", str(path)) as started:
            log = _Log(path)
            gaps, quiet, spans, parts = [], [], [], []
            for _ in range(scale.rounds(100, 5)):
                quiet.append(_longest_gap_ms(started.address, 0.3))
                before = log.count("resumed")
                os.kill(started.pid, signal.SIGUSR2)
                gaps.append(_longest_gap_ms(started.address, LIMIT_S, log, before))
                spans.append(log.last_span_ms("upgrading", "resumed"))
                parts.append(_parts_ms())
    worst = quantile(gaps, 0.99)
    floor = [interpreter + imports for interpreter, imports, _ in parts]
    least_ms = quantile(floor, 0.99)
    allowed_ms = max(30, least_ms + 10) if most_ms is None else most_ms
    interpreter, imports, kept = ([part[k] for part in parts] for k in range(3))
    rest_ms = median(gaps) - median(floor) - median(kept)
    more_ms = median([gap - least for gap, least in zip(gaps, floor, strict=True)])
    return [
        Figure(
            f"{prefix}no accept at an upgrade (USR2), p99 of {len(gaps)}",
            _spread(gaps),
            f"<= {allowed_ms:.0f} ms",
            "",
            worst <= allowed_ms,
            [
                "the longest time between two answers to a client that asks one by one, from "
                "the signal until 0.1 s after the new program serves",
                f"the same without an upgrade, 0.3 s before each: {_spread(quiet)}",
                f"from the decision to exec to the new program's first line: {_spread(spans)}",
                f"the floor, measured beside each upgrade: {_spread(floor)}",
            ],
        ),
        Figure(
            f"{prefix}median of the same, more than the floor beside it",
            f"{more_ms:+.1f} ms",
            "<= 10 ms" if most_ms is None else "",
            "",
            more_ms <= 10 if most_ms is None else None,
            [
                f"of the floor the interpreter's start {median(interpreter):.1f} ms, "
                f"imports {median(imports):.1f}",
                f"keeping the code of late modules {median(kept):.1f} ms",
                "writing and reading the state, making the parts, adopting, the exec, "
                f"and the client's own time {rest_ms:.1f} ms",
            ],
        ),
    ]


# -- SIGKILL under --guard ------------------------------------------------------------


def guarded(guard: int) -> int:
    """Return the pid of the protector below a guard, once there is one."""
    until_s = time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        for child in Path(f"/proc/{guard}/task/{guard}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "SocketProtector":
                return int(child)
        time.sleep(LIGHT_S)
    raise CannotMeasure(f"the guard {guard} has no protector")


def _pss_kib(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    if found is None:
        raise CannotMeasure(f"no Pss of process {pid}")
    return int(found[1])


def _alone_kib(*pids: int) -> int:
    """Return what these would take together if no other process shared pages with them.

    Pages of files count once for all, whatever else maps them; so this cannot be flattered
    by other Pythons on the machine, as PSS is.
    """
    private = 0
    shared: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for pid in pids:
        where = ("", "")
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                words = line.split(maxsplit=5)
                where = (words[5] if len(words) > 5 else f"anonymous {pid}", words[2])
            elif name.startswith("Private_") and "Hugetlb" not in name:
                private += int(rest.split()[0])
            elif name in ("Shared_Clean:", "Shared_Dirty:"):
                shared[where][pid] = shared[where].get(pid, 0) + int(rest.split()[0])
    return private + sum(max(each.values()) for each in shared.values())


def _kill_and_ask(started: Started) -> float:
    """SIGKILL the protector; return the milliseconds to the answer to the next client."""
    pid = guarded(started.pid)
    pidfd = os.pidfd_open(pid)
    killed_s = time.monotonic()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(LIMIT_S * 1000)
    os.close(pidfd)
    ask(started.address)  # begun when no process was there to accept it
    return (time.monotonic() - killed_s) * 1e3


def survive(scale: Scale) -> list[Figure]:
    """SIGKILL of a guarded protector: until the next accept; and what the two of them take."""
    with protector("library", "--guard") as started:
        load(started, 64, 0.5)
        fresh = guarded(started.pid)
        pss = [_pss_kib(started.pid) + _pss_kib(fresh)]
        alone = [_alone_kib(started.pid, fresh)]
        times = []
        for _ in range(scale.rounds(100, 5)):
            times.append(_kill_and_ask(started))
            time.sleep(0.1)
        load(started, 64, 0.5)
        last = guarded(started.pid)
        pss.append(_pss_kib(started.pid) + _pss_kib(last))
        alone.append(_alone_kib(started.pid, last))
        guard_mb = resident_kib(started.pid) / 1024
        last_mb = resident_kib(last) / 1024
    worst, pss_mb = quantile(times, 0.99), max(pss) / 1024
    return [
        Figure(
            f"SIGKILL under --guard to the next connection answered, p99 of {len(times)}",
            _spread(times),
            "<= 300 ms",
            "",
            worst <= 300,
            ["the connection is begun when the killed protector has ended"],
        ),
        Figure(
            "guard and protector together (PSS)",
            f"{pss_mb:.1f} MB",
            "<= 18 MB",
            "",
            pss_mb <= 18,
            [
                f"{pss[0] / 1024:.1f} MB at first, {pss[1] / 1024:.1f} after {len(times)} kills, "
                "each after half a second of load",
                f"if no other process on the machine ran this Python: {max(alone) / 1024:.1f} MB",
                f"the protector's VmRSS {last_mb:.1f} MB",
            ],
        ),
        Figure("the guard (VmRSS)", f"{guard_mb:.1f} MB", "<= 11 MB", "", guard_mb <= 11),
    ]


def handed_survive(scale: Scale) -> list[Figure]:
    """SIGKILL of a guarded protector whose workers accept: they go on meanwhile."""
    with protector(*HANDED, "--guard") as started:
        times, quiet = [], []
        for _ in range(scale.rounds(100, 5)):
            times.append(_kill_and_ask(started))
            quiet.append(_longest_gap_ms(started.address, 0.1))
    worst = quantile(times, 0.99)
    return [
        Figure(
            "--handoff listener: SIGKILL under --guard to the next connection answered, "
            f"p99 of {len(times)}",
            _spread(times),
            "<= 50 ms",
            "",
            worst <= 50,
            [f"the longest time between two answers in 0.1 s after it: {_spread(quiet)}"],
        )
    ]


# -- 10,000 connections that stay ------------------------------------------------------


def lasting(scale: Scale) -> list[Figure]:
    """Idle connections that keep old generations alive: what they cost the protector."""
    generations, connections = scale.rounds(GENERATIONS, 5), scale.rounds(LASTING, 200)
    few = generations
    with protector() as laden, protector() as light:
        begun_kib = resident_kib(laden.pid)
        held = pile_up(laden, generations, connections)
        kept = pile_up(light, generations, few)
        try:
            return _compared(scale, laden, light, held, generations, begun_kib)
        finally:
            for sock in held + kept:
                sock.close()


def _compared(
    scale: Scale,
    laden: Started,
    light: Started,
    held: list[socket.socket],
    generations: int,
    begun_kib: int,
) -> list[Figure]:
    # The same half second of load for both, so that both heaps have seen it.
    for started in (laden, light):
        load(started, 64, 0.5, "--plain")
    laden_kib, light_kib = resident_kib(laden.pid), resident_kib(light.pid)
    many, many_light = alternately(
        scale.rounds(5),
        lambda: load(laden, 64, scale(3, 0.5), "--plain"),
        lambda: load(light, 64, scale(3, 0.5), "--plain"),
    )
    nothing_failed(many + many_light)
    time.sleep(scale(20, 1))
    before, spent_before = sum(switches(laden.pid)), cpu_ns(laden.pid)
    watched_s = scale(20, 2)
    time.sleep(watched_s)
    woken, spent_ns = sum(switches(laden.pid)) - before, cpu_ns(laden.pid) - spent_before
    answered, by = still_there(held)
    spent_ratio, words = ratio(column(many, "parent_us"), column(many_light, "parent_us"))
    of = f"{len(held):,} idle connections in {generations} draining generations"
    return [
        Figure(
            f"{of}: the protector's memory, more than with {generations} connections",
            f"{(laden_kib - light_kib) / 1024:+.2f} MB",
            "flat",
            "",
            abs(laden_kib - light_kib) <= NOISE_KIB,
            [
                f"VmRSS {laden_kib / 1024:.1f} MB against {light_kib / 1024:.1f} with one "
                f"connection in each generation; {begun_kib / 1024:.1f} with one generation, so "
                f"{(laden_kib - begun_kib) / generations:.0f} KiB a generation",
                f"afterwards {answered:,} of {len(held):,} answered, by {by} workers",
            ],
        ),
        Figure(
            "its CPU per forwarded connection / with as many generations and "
            f"{generations} connections",
            words,
            "flat",
            "",
            spent_ratio <= 1.1 and answered == len(held),
            [
                f"{middle_of(many, 'parent_us'):.1f} us against "
                f"{middle_of(many_light, 'parent_us'):.1f}",
                f"idle: {woken} wake-ups, {spent_ns / 1e3:.0f} us of CPU in {watched_s:.0f} s",
            ],
        ),
    ]
