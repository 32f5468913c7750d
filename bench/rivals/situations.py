"""The situations: faults and reloads of each rival while clients come, and their results.

A round is as long as the operator wants, but beside a fault at most FAULT_S.  The fault comes at a
quarter of it, and its end at three quarters.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from bench.figures import median
from bench.hog_rows import burning
from bench.processes import CannotMeasure, built
from bench.reload_rows import EverySecond
from bench.rivals.installing import helpers, helping
from bench.rivals.running import LOOKS_S, Running, cpu_s, pss_kib

Seen = dict[str, Any]
_END = ("--expect", "pong", "--timeout", "5")
SHORT = ("--plain", "--send", "GET / HTTP/1.0\r\n\r\n", *_END)
KEPT = ("--again", "--send", "GET / HTTP/1.1\r\nHost: rivals\r\n\r\n", *_END)
#: A killed worker is stopped for so long before, so that clients wait in the queue.
STOPPED_S = 0.3
#: A longer round shows nothing more of one fault.
FAULT_S = 8.0
#: The old processes of a reload have ended after this time.
_ENDS_S = 2.0
RELOADS = 5


class Loading:
    """A load generator that runs beside a situation; `seen` has its result.

    finds_gaps: it finds the longest gap by times of arrival, which costs CPU for each request.
    """

    def __init__(
        self,
        one: Running,
        at_once: int,
        seconds: float,
        options: tuple[str, ...],
        *,
        finds_gaps: bool = True,
    ) -> None:
        if finds_gaps:
            options = (*options, "--arrivals")
        words = [built("load"), "-c", str(at_once), "-t", str(seconds), *options, one.address]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE)
        self.seen: Seen = {}
        self._limit_s = seconds + 30

    @contextmanager
    def running(self) -> Iterator[None]:
        with helping(self._process):
            yield
            said = self._process.communicate(timeout=self._limit_s)[0]
        if self._process.returncode:
            raise CannotMeasure(f"the generator ended with {self._process.returncode}")
        self.seen = json.loads(said.splitlines()[-1])


def _quiet(one: Running, seconds: float, at_once: int, options: tuple[str, ...] = SHORT) -> Seen:
    pids = one.family()
    before_s = cpu_s(pids)
    load = Loading(one, at_once, seconds, options, finds_gaps=False)
    with load.running():
        pass
    spent_s = cpu_s(pids) - before_s
    load.seen["cpu_us"] = spent_s / max(1, load.seen["connections"]) * 1e6
    return load.seen


def _replaced(one: Running) -> bool:
    """Whether a good release still gets to serve by a reload."""
    one.reload()
    return one.until_new()


def _reloading(one: Running, seconds: float, at_once: int, options: tuple[str, ...]) -> Seen:
    load = Loading(one, at_once, seconds, options)
    with load.running(), EverySecond(one.reload) as each:
        time.sleep(max(0.0, seconds - 0.5))
    load.seen["reloads"] = each.count
    load.seen["replaced"] = _replaced(one)
    return load.seen


def _release(one: Running, seconds: float, name: str) -> Seen:
    """Deploy a release that is bad in some way, then a good one."""
    seconds = min(seconds, FAULT_S)
    load = Loading(one, 8, seconds, SHORT)
    with load.running():
        time.sleep(seconds / 4)
        begun_s = time.monotonic()
        one.reload(name)
        time.sleep(max(0.0, seconds / 2 - (time.monotonic() - begun_s)))
        one.reload()
    load.seen["replaced"] = _replaced(one)
    return load.seen


def _fault(one: Running, seconds: float, at_once: int, act: Callable[[], object]) -> Seen:
    seconds = min(seconds, FAULT_S)
    load = Loading(one, at_once, seconds, SHORT)
    with load.running():
        time.sleep(seconds / 4)
        act()
    load.seen["replaced"] = _replaced(one)
    return load.seen


def kill_worker(one: Running) -> None:
    """Stop all that answer until clients wait in the queue, then kill one of them.

    Raises CannotMeasure if none answers in time, or one still answers after 32 questions.  Raises
    OSError.
    """
    family = set(one.family())
    stopped: list[int] = []
    try:
        with suppress(TimeoutError):  # no worker is left that answers
            for _ in range(32):
                pid = one.ask(STOPPED_S).pid
                # Stop it before the next question: one of two idle workers could answer them all.
                if pid in family and pid not in stopped:
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
            raise CannotMeasure("not all workers could be stopped")
        if not stopped:
            raise CannotMeasure("no worker answered")
        os.kill(stopped.pop(0), signal.SIGKILL)
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _worker_killed(one: Running, seconds: float) -> Seen:
    seen = _fault(one, seconds, 64, lambda: kill_worker(one))
    if seen["gap_us"] < STOPPED_S * 0.8e6:
        raise CannotMeasure("a worker answered while all should have been stopped")
    return seen


def _memory(one: Running, seconds: float) -> Seen:
    """The memory while it serves, and the most during reloads."""
    for _ in range(50):
        one.ask()
    time.sleep(0.5)
    idle = most = pss_kib(one.family())
    for _ in range(3):
        load = Loading(one, 1, max(1.0, seconds / 5), SHORT)
        with load.running():
            one.reload()
            until_s = time.monotonic() + max(1.0, seconds / 5)
            while time.monotonic() < until_s:
                most = max(most, pss_kib(one.family()))
                time.sleep(0.02)
        one.until_new()
    return {"idle_mb": idle / 1000, "most_mb": most / 1000}


def _first(one: Running, seconds: float) -> Seen:
    """The order to reload to the first answer of a new process."""
    took = []
    for _ in range(RELOADS):
        one.deploy("good")
        # In a thread, because some orders return only when the old processes have ended.
        order = threading.Thread(target=one.order_reload)
        begun_s = time.monotonic()
        order.start()
        if one.until_new():
            took.append((time.monotonic() - begun_s) * 1e3)
        order.join()
        time.sleep(min(_ENDS_S, seconds / 5))  # until the old processes have ended
    if not took:
        raise CannotMeasure(f"no new process answered within {LOOKS_S:g} s")
    return {"first_ms": median(took), "first_most_ms": max(took), "missed": RELOADS - len(took)}


def _beside_a_hog(one: Running, seconds: float) -> Seen:
    with burning() as hog:
        helpers.add(hog)
        try:
            return _quiet(one, seconds, 64)
        finally:
            helpers.discard(hog)


@dataclass(frozen=True)
class Situation:
    """A column of the table: an action, and the rivals that it is for."""

    title: str
    run: Callable[[Running, float], Seen]
    everyone: bool = False
    unix: bool = False
    reloads: bool = True  # whether it takes a reload
    one_group: bool = False


SITUATIONS = {
    "short": Situation(
        "short connections, C=8", lambda one, s: _quiet(one, s, 8), everyone=True, reloads=False
    ),
    "reload": Situation(
        "the same, a reload each second", lambda one, s: _reloading(one, s, 8, SHORT), everyone=True
    ),
    "c64": Situation("C=64", lambda one, s: _quiet(one, s, 64), reloads=False),
    "c64-reload": Situation(
        "C=64, a reload each second", lambda one, s: _reloading(one, s, 64, SHORT)
    ),
    "keep-alive": Situation(
        "keep-alive, C=8, a reload each second", lambda one, s: _reloading(one, s, 8, KEPT)
    ),
    "unix": Situation(
        "UNIX behind nginx, C=8, a reload each second",
        lambda one, s: _reloading(one, s, 8, SHORT),
        unix=True,
    ),
    "broken": Situation("a broken release", lambda one, s: _release(one, s, "broken")),
    "slow": Situation("a release that starts in 1.5 s", lambda one, s: _release(one, s, "slow")),
    "answers-500": Situation(
        "a release that answers 500", lambda one, s: _release(one, s, "answers-500")
    ),
    "worker": Situation("a worker killed with a full queue, C=64", _worker_killed),
    "supervisor": Situation(
        "the supervisor killed",
        lambda one, s: _fault(one, s, 8, lambda: os.kill(one.supervisor(), signal.SIGKILL)),
    ),
    "upgrade": Situation("the supervisor upgraded", lambda one, s: _fault(one, s, 8, one.upgrade)),
    "hog": Situation("C=64 beside a hog on one core", _beside_a_hog, reloads=False, one_group=True),
    "memory": Situation("memory", _memory),
    "first": Situation("HUP to the first new answer", _first),
}
