"""How long clients wait while a release starts that takes its time and says nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

from bench.figures import Figure, Scale
from bench.processes import HERE, Started, ask, free_port

#: Until a release accepts.
START_S = 1.5
#: After the switch: what is told later, or ends too soon, shows here.
AFTER_S = 1.0
_LIMIT_S = 30.0
_OURS = str(Path(sysconfig.get_path("scripts")) / "SocketProtector")


class _Longest(NamedTuple):
    """The longest answer, and when it began: seconds after the reload, and after the switch."""

    ms: float
    after_s: float
    after_switch_s: float
    failed: int

    def __str__(self) -> str:
        when = f"{self.after_switch_s * 1e3:+.0f} ms from the first of the release"
        failed = f"; {self.failed} failed" if self.failed else ""
        return f"{self.ms:.1f} ms, {self.after_s:.2f} s after HUP ({when}){failed}"


class _Answers(NamedTuple):
    """When each client began to ask, and how long that took; of the first of another worker, too.

    failed: how many were refused or reset.
    """

    each: list[tuple[float, float]]
    switched: float | None
    failed: int


def _asked(address: str, for_s: float) -> _Answers:
    """Ask one client after the other for so long, or until AFTER_S after another worker answers."""
    answers: list[tuple[float, float]] = []
    old, switched, failed = 0, None, 0
    until = time.monotonic() + for_s
    while (began := time.monotonic()) < until:
        try:
            pid = ask(address)[0]
        except OSError:
            failed += 1
            continue
        answers.append((began, time.monotonic() - began))
        if old and pid != old:
            switched, until = began, began + AFTER_S
        old = pid
        time.sleep(0.0005)
    return _Answers(answers, switched, failed)


def _longest(started: Started) -> tuple[_Longest, float]:
    """Reload once; return the longest of all answers, and of as many without a reload."""
    ask(started.address)  # The first answer of a worker that warms up is not the reload's.
    os.kill(started.pid, signal.SIGHUP)
    began = time.monotonic()
    seen = _asked(started.address, _LIMIT_S)
    at, took = max(seen.each, key=lambda each: each[1])
    longest = _Longest(took * 1e3, at - began, at - (seen.switched or at), seen.failed)
    still = _asked(started.address, time.monotonic() - began)
    return longest, max(took for _, took in still.each) * 1e3


def _ways(address: str) -> dict[str, list[str]]:
    slow = [sys.executable, "-S", "-E", str(HERE / "slow.py"), str(START_S)]
    ours = [_OURS, "-f", "--handoff", "listener"]
    found = {
        "asked (the default)": [*ours, address, "--", *slow],
        "alive for 1 s": [*ours, "--ready", "after:1s", address, "--", *slow],
    }
    if starter := shutil.which("start_server"):
        found["Server::Starter"] = [
            *(starter, f"--port={address}", "--signal-on-hup=TERM", "--interval=1", "--", *slow)
        ]
    return found


def wait(scale: Scale) -> list[Figure]:
    """The longest answer while a release takes 1.5 s until it accepts."""
    longest: dict[str, list[tuple[_Longest, float]]] = {}
    for name in _ways(""):
        address = f"127.0.0.1:{free_port()}"
        with Started(_ways(address)[name], address, {}, []) as started:
            longest[name] = [_longest(started) for _ in range(scale.rounds(5, 1))]
    ours, *others = longest
    most = max(one.ms for one, _ in longest[ours])
    still = max(each for _, each in longest[ours])
    failed = sum(one.failed for one, _ in longest[ours])
    return [
        Figure(
            f"a release that accepts after {START_S:g} s: the longest answer meanwhile",
            f"{most:.1f} ms",
            "<= 10 ms",
            "",
            most <= 10 and not failed,
            [
                f"{len(longest[ours])} reloads each; for as long without a reload: {still:.1f} ms",
                *(f"{name}: {max(each for each, _ in longest[name])}" for name in (ours, *others)),
            ],
        )
    ]
