"""How long clients wait while a release starts that takes its time and says nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

from bench.figures import Figure, Scale
from bench.processes import HERE, Started, ask, free_port

#: Until a release accepts.
START_S = 1.5
#: After the switch: what is told later, or ends too soon, shows here.
AFTER_S = 1.0
_LIMIT_S = 30.0
_OURS = str(Path(sysconfig.get_path("scripts")) / "SocketProtector")


def _longest_ms(started: Started) -> float:
    """Reload once; return how long the longest of all answers took, one client after the other."""
    old = ask(started.address)[0]
    os.kill(started.pid, signal.SIGHUP)
    longest, until = 0.0, time.monotonic() + _LIMIT_S
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            pid = ask(started.address)[0]
        except OSError:
            longest = _LIMIT_S  # refused, or reset
            break
        longest = max(longest, time.monotonic() - began)
        if pid != old:
            old, until = pid, time.monotonic() + AFTER_S
        time.sleep(0.0005)
    return longest * 1e3


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
    longest: dict[str, list[float]] = {}
    for name in _ways(""):
        address = f"127.0.0.1:{free_port()}"
        with Started(_ways(address)[name], address, {}, []) as started:
            longest[name] = [_longest_ms(started) for _ in range(scale.rounds(5, 1))]
    ours, *others = longest
    most = max(longest[ours])
    return [
        Figure(
            f"a release that accepts after {START_S:g} s: the longest answer meanwhile",
            f"{most:.1f} ms",
            "<= 10 ms",
            "",
            most <= 10,
            [
                f"{len(longest[ours])} reloads each; "
                + "; ".join(f"{name}: {max(longest[name]):.0f} ms" for name in others)
            ],
        )
    ]
