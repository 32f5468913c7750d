"""One function for each line of the table that is about rollouts: canaries and rolling reloads."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from bench.figures import Figure, Scale
from bench.processes import ROOT, CannotMeasure, Started, ask, descendants, free_port, generate
from bench.survive_rows import quantile
from socketprotector.demo.load import Load

LIMIT_S = 60.0
WORKERS = 8
BALLAST_MB = 100
CONNECTIONS = 100_000
LOOK_S = 0.02
HANDOFFS = {"connection": (), "listener": ("--handoff", "listener", "--ready", "notify")}
#: Of the bad canary: each Nth connection fails.
FAILS = 10
PER_S = 1000


class Service:
    """A protector whose releases are put in place as a deploy does, and its log."""

    def __init__(self, folder: Path, options: Sequence[str], release: Sequence[str]) -> None:
        """options: {folder} stands for the folder."""
        self.folder = folder
        self._log, self._program = folder / "log", folder / "daemon"
        self.release(*release)
        address = f"127.0.0.1:{free_port()}"
        program = str(Path(sysconfig.get_path("scripts")) / "SocketProtector")
        own = [each.format(folder=folder) for each in options]
        words = [program, "-f", "--log-file", str(self._log), *own, address, "--"]
        self.started = Started([*words, str(self._program)], address, {}, [])
        self.address = address

    def release(self, *options: str) -> None:
        """Put a release in place, for the next reload."""
        words = [sys.executable, "-m", "bench.release", str(self.folder), *options]
        new = self._program.with_suffix(".new")
        new.write_text(f"#!/bin/sh\nexport PYTHONPATH={ROOT}\nexec {shlex.join(words)}\n")
        new.chmod(0o755)
        new.replace(self._program)

    def reload(self) -> int:
        """Request a reload; return the length of the log before it."""
        mark = len(self._log.read_text())
        os.kill(self.started.pid, signal.SIGHUP)
        return mark

    def wait_for(self, pattern: str, mark: int) -> re.Match[str]:
        """Return the first match in the log behind the mark."""
        until_s = time.monotonic() + LIMIT_S
        while time.monotonic() < until_s:
            if found := re.search(pattern, self._log.read_text()[mark:], re.MULTILINE):
                return found
            time.sleep(0.005)
        raise CannotMeasure(f"no {pattern} within {LIMIT_S:g} s: {self._log.read_text()[mark:]}")

    def size(self, name: str) -> int:
        """Return how much the workers have counted."""
        path = self.folder / name
        return path.stat().st_size if path.exists() else 0

    def pss_mb(self) -> float:
        """Return the memory of all of its processes, in 1,000,000 bytes."""
        kib = 0
        for pid in (self.started.pid, *descendants_now(self.started.pid)):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue  # it has just ended
            found = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
            kib += int(found[1]) if found else 0
        return kib * 1024 / 1e6


def descendants_now(pid: int) -> list[int]:
    """Return the descendants of a process, some of which end meanwhile."""
    while True:
        try:
            return descendants(pid)
        except OSError:
            continue


@contextmanager
def serving(*options: str, release: Sequence[str] = ()) -> Iterator[Service]:
    """Start a service in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        service = Service(Path(name), options, release)
        with service.started:
            yield service


class Repeated:
    """Calls `act` again and again, in a thread, while the `with` block runs."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: Exception | None = None

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._act()
            except Exception as error:
                self._error = error
                return

    def __enter__(self) -> Repeated:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise CannotMeasure(repr(self._error)) from self._error


# -- memory ---------------------------------------------------------------------


def _peak(scale: Scale, *options: str) -> tuple[float, float, int, int]:
    """Return MB while serving, the peak of a reload, connections and failed ones."""
    count = scale.rounds(CONNECTIONS, 2_000)
    ballast = ("--ballast", str(scale.rounds(BALLAST_MB, 20)))
    peak = 0.0
    seen = {"connections": 0, "failed": 0}
    with serving("--workers", str(WORKERS), *options, release=ballast) as service:
        service.wait_for("event=ready generation=1", 0)
        serves = service.pss_mb()

        def look() -> None:
            nonlocal peak
            peak = max(peak, service.pss_mb())
            time.sleep(LOOK_S)

        def loaded() -> None:
            found = generate(service.address, "-c", "16", "-n", str(count // 20), "--plain")
            for name in seen:
                seen[name] += int(found[name])

        host, port = service.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 10) as held:
            held.sendall(b"hold\n")
            if not held.recv(512).endswith(b"hold\n"):
                raise CannotMeasure("the connection to be held was not answered")
            with Repeated(look), Repeated(loaded):
                mark = service.reload()
                while seen["connections"] < count // 2:
                    time.sleep(LOOK_S)
                held.close()
                service.wait_for("event=drained generation=1", mark)
                while seen["connections"] < count:
                    time.sleep(LOOK_S)
    return serves, peak, seen["connections"], seen["failed"]


def rolling(scale: Scale) -> list[Figure]:
    """The memory of a rolling reload under load, one old worker held open."""
    figures = []
    for handoff, mode in HANDOFFS.items():
        limits = ("--drain-timeout", "60s", *mode)
        taken = {
            order: _peak(scale, "--reload-order", order, *limits)
            for order in ("rolling", "start-first")
        }
        serves, peak, count, failed = taken["rolling"]
        beside_serves, beside_peak, beside_count, beside_failed = taken["start-first"]
        figures.append(
            Figure(
                f"{handoff}: rolling reload of {WORKERS} workers of {BALLAST_MB} MB, a client held "
                "open: peak PSS / serving",
                f"{peak / serves:.2f}",
                "<= 1.15",
                "",
                peak / serves <= 1.15,
                [
                    f"{peak:.0f} MB against {serves:.0f}",
                    f"start-first beside: {beside_peak / beside_serves:.2f} ({beside_peak:.0f} MB "
                    f"against {beside_serves:.0f}), {beside_failed} of {beside_count:,} failed",
                ],
            )
        )
        what = f"{handoff}: connections that failed meanwhile"
        figures.append(Figure(what, f"{failed} of {count:,}", "0", "", failed == 0))
    return figures


# -- canaries ----------------------------------------------------------------------


def _bad_release(mode: Sequence[str]) -> tuple[int, int, list[str]]:
    """Return how many connections met a bad release, how many failed there, and other failures."""
    check = "check:test ! -s {folder}/failed"
    words = ("--canary", "5%", "--canary-for", "1h", "--settle-check", check)
    with serving("--workers", "2", *words, *mode) as service:
        service.release("--fails", str(FAILS))
        load = Load(service.address, concurrency=64, rate_per_s=PER_S)
        with load:
            load.wait_for(lambda now: now.connections > PER_S)
            mark = service.reload()
            service.wait_for("event=reload-failed .*settle-check", mark)
            now = load.snapshot().connections
            load.wait_for(lambda then: then.connections > now + PER_S // 2)
        bad, met = service.size("failed"), service.size("met")
        found = load.snapshot().failures
        others = [str(each) for each in found if each.kind not in ("reset", "empty")]
        return met, bad, [*others, *("one more failure",) * (len(found) - len(others) - bad)]


def canary(scale: Scale) -> list[Figure]:
    """How many connections meet a bad release before a check that looks each second."""
    figures = []
    for handoff, mode in HANDOFFS.items():
        runs = [_bad_release(mode) for _ in range(scale.rounds(10))]
        met, failed = [run[0] for run in runs], [run[1] for run in runs]
        others = [each for run in runs for each in run[2]]
        figures.append(
            Figure(
                f"{handoff}: connections that met a release that fails every {FAILS}th, at 5 % of "
                f"{PER_S:,}/s, before a --settle-check that looks each second",
                f"{max(met)} at most of {len(runs)} (median {quantile(met, 0.5):.0f})",
                "<= 150",
                "",
                max(met) <= 150 and min(failed) > 0 and not others,
                [
                    f"of these failed: {max(failed)} at most (median {quantile(failed, 0.5):.0f}); "
                    f"elsewhere {len(others)}",
                    *others[:3],
                ],
            )
        )
    return figures


class _Asking:
    """Asks one by one, and keeps when each answer came."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.answers: list[tuple[float, float]] = []  # began, seconds
        self.failed = 0

    def once(self) -> None:
        began_s = time.time()
        try:
            ask(self._address)
        except ConnectionError:
            self.failed += 1
            return
        self.answers.append((began_s, time.time() - began_s))
        time.sleep(0.001)


def _deaths(mode: Sequence[str], rounds: int) -> tuple[list[float], list[float], int]:
    """Return ms from a kill of the canary to the return of its share, and to answers; failures."""
    returned, longest, failed = [], [], 0
    with serving("--canary", "50%", "--canary-for", "1h", *mode) as service:
        for _ in range(rounds):
            asking = _Asking(service.address)
            with Repeated(asking.once):
                mark = service.reload()
                order = service.wait_for(r"event=route generation=(\d+) sharing=(\d+) ", mark)
                old, new = order.groups()
                pid = int(service.wait_for(rf"spawned generation={new} .*pid=(\d+)", mark)[1])
                time.sleep(0.2)
                killed_s = time.time()
                os.kill(pid, signal.SIGKILL)
                route = service.wait_for(rf"^(\S+) info event=route generation={old}$", mark)
                service.wait_for(f"event=drained generation={new}", mark)
                time.sleep(1.0)  # where workers accept, its clients may need a generation
            returned.append((datetime.fromisoformat(route[1]).timestamp() - killed_s) * 1e3)
            near = [took for began, took in asking.answers if began + took > killed_s]
            longest.append(max(near) * 1e3)
            failed += asking.failed
    return returned, longest, failed


def returned(scale: Scale) -> list[Figure]:
    """SIGKILL of a canary's worker to the return of its share."""
    figures = []
    for handoff, mode in HANDOFFS.items():
        spans, answers, failed = _deaths(mode, scale.rounds(30, 3))
        figures.append(
            Figure(
                f"{handoff}: SIGKILL of a canary's worker to the return of its share",
                f"{max(spans):.0f} ms at most of {len(spans)} (median {quantile(spans, 0.5):.0f})",
                "<= 100 ms",
                "",
                max(spans) <= 100,
                [
                    "the longest answer to a client that asks one by one: "
                    f"{max(answers):.0f} ms (median {quantile(answers, 0.5):.0f})",
                    f"of its connections {failed} were at the killed worker",
                ],
            )
        )
    return figures
