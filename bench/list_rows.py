"""One function for the line of the table about many instances: how long it takes to list them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.figures import Figure, Scale, median
from bench.processes import CannotMeasure

LIMIT_S = 120.0
_PROTECTOR = (sys.executable, "-P", "-m", "socketprotector", "-f")
_CTL = (sys.executable, "-P", "-m", "socketprotector.ctl")


def listing(scale: Scale) -> list[Figure]:
    """`socketprotectorctl list` with 100 instances that serve and 10 sockets of dead ones."""
    count, dead = scale.rounds(100, 10), scale.rounds(10, 2)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_RUNTIME_DIR": folder}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(count + dead):
                command = (*_PROTECTOR, "--name", f"i{number:03}", "--ready", "after:1ms")
                listens = f"unix:{folder}/s{number}"
                started.append(
                    subprocess.Popen(
                        [*command, listens, "--", "sleep", "3600"],
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
                if number % 10 == 9:  # not all at once: they would wait for one another
                    _serving(environment, number + 1)
            _serving(environment, count + dead)
            _kill(started[count:])
            times = [_list_s(environment, count) for _ in range(scale.rounds(9))]
            in_process_s = median([_ask_s(folder) for _ in range(scale.rounds(9))])
        finally:
            _end(started)
    slowest = max(times)
    return [
        Figure(
            f"socketprotectorctl list, {count} instances and {dead} dead ones",
            f"{median(times):.2f} s (slowest {slowest:.2f})",
            "< 1 s",
            "",
            slowest < 1,
            [f"the asking alone, without the start of an interpreter: {in_process_s * 1e3:.0f} ms"],
        )
    ]


def _listed(environment: dict[str, str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [*_CTL, "list", "--json"], env=environment, capture_output=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)["instances"]
    # Others may run on this machine, with sockets in the system's folder.
    return [each for each in found if each["control"].startswith(environment["XDG_RUNTIME_DIR"])]


def _serving(environment: dict[str, str], wanted: int) -> None:
    until = time.monotonic() + LIMIT_S
    while True:
        phases = [(each["status"] or {}).get("phase") for each in _listed(environment)]
        if phases.count("serving") >= wanted:
            return
        if time.monotonic() > until:
            raise CannotMeasure(f"{phases.count('serving')} of {wanted} instances serve")
        time.sleep(0.05)


def _list_s(environment: dict[str, str], wanted: int) -> float:
    begun_s = time.monotonic()
    done = subprocess.run([*_CTL, "list"], env=environment, capture_output=True, text=True)
    spent_s = time.monotonic() - begun_s
    ours = [line for line in done.stdout.splitlines() if environment["XDG_RUNTIME_DIR"] in line]
    serving = sum(" serving " in line for line in ours)
    if done.returncode or serving != wanted:
        raise CannotMeasure(f"not all were listed: {serving} of {wanted}")
    return spent_s


def _ask_s(folder: str) -> float:
    from socketprotector.ctl.query_all import query_all

    paths = [str(path) for path in Path(folder, "socketprotector").glob("*.control")]
    begun_s = time.monotonic()
    query_all(paths)
    return time.monotonic() - begun_s


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGKILL: their sockets stay, and no process listens there."""
    for each in processes:
        workers = Path(f"/proc/{each.pid}/task/{each.pid}/children").read_text().split()
        each.kill()
        each.wait()
        for worker in workers:  # `sleep` does not read its channel, so nothing would end it
            try:
                os.kill(int(worker), signal.SIGKILL)
            except ProcessLookupError:
                pass


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for each in processes:
        if each.poll() is None:
            each.send_signal(signal.SIGINT)
    for each in processes:
        each.wait()
