"""One function for each line of the table about operating: counting, asking, and all at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.figures import Figure, Scale, alternately, median, ratio
from bench.processes import ROOT, CannotMeasure, generate, protector, resident_kib, stamps
from bench.rows import Seen, column, load, middle_of, nothing_failed
from bench.survive_rows import guarded, quantile

LIMIT_S = 20.0
#: Often enough for a p99, rarely enough not to be the load itself.
EVERY_S = 0.01


class Asker:
    """Asks a control socket, one request after the other."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT_S)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")

    def ask(self, command: str) -> dict[str, Any]:
        self._socket.sendall(json.dumps({"v": 1, "command": command}).encode() + b"\n")
        found = json.loads(self._lines.readline())
        if not found["ok"]:
            raise CannotMeasure(f"{command}: {found['error']}")
        result: dict[str, Any] = found["result"]
        return result

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()


@contextmanager
def _place() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"{folder}/control"


def _counted(path: str) -> int | None:
    """Return how many connections the workers say they have taken."""
    with Asker(path) as asker:
        [generation] = asker.ask("status")["generations"]
    accepted: int | None = generation["accepted"]
    return accepted


def scoreboard(scale: Scale) -> list[Figure]:
    """Connections/s of a worker that counts, against the same one that does not."""
    with (
        _place() as one,
        _place() as another,
        protector("counted", "--control", one) as counted,
        protector("uncounted", "--control", another) as uncounted,
    ):
        on, off = alternately(
            scale.rounds(9),
            lambda: load(counted, 64, scale(3, 0.5), "--plain"),
            lambda: load(uncounted, 64, scale(3, 0.5), "--plain"),
        )
        told = _counted(one)
        if not told or _counted(another) is not None:
            raise CannotMeasure("it is not counted where it should be, or where it should not")
    nothing_failed(on + off)
    middle, words = ratio(column(on, "per_second"), column(off, "per_second"))
    return [
        Figure(
            "connections/s with the scoreboard / without, C=64, the library's Listener",
            words,
            ">= 0.98",
            "",
            middle >= 0.98,
            [
                f"{middle_of(on, 'per_second'):,.0f}/s and {middle_of(off, 'per_second'):,.0f}/s; "
                f"the worker's CPU a connection {middle_of(on, 'workers_us'):.1f} and "
                f"{middle_of(off, 'workers_us'):.1f} us; {told:,} were counted",
            ],
        )
    ]


def status(scale: Scale) -> list[Figure]:
    """How long `status` takes while as much is forwarded as goes."""
    seconds = scale(30, 2)
    with _place() as path, protector("counted", "--control", path) as started:
        seen: list[Seen] = []
        loading = threading.Thread(
            target=lambda: seen.append(generate(started.address, "-c", "64", "-t", str(seconds)))
        )
        times = []
        with Asker(path) as asker:
            loading.start()
            while loading.is_alive():
                begun_s = time.monotonic()
                asker.ask("status")
                times.append((time.monotonic() - begun_s) * 1e3)
                time.sleep(EVERY_S)
        loading.join()
    nothing_failed(seen)
    worst = quantile(times, 0.99)
    return [
        Figure(
            f"`status` at full load, p99 of {len(times)}",
            f"{worst:.1f} ms (median {median(times):.1f}, longest {max(times):.1f})",
            "< 50 ms",
            "",
            worst < 50,
            [f"{seen[0]['per_second']:,.0f} connections/s meanwhile"],
        )
    ]


@contextmanager
def _hostile(path: str) -> Iterator[None]:
    command = [sys.executable, "-m", "bench.hostile", path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            if process.stdout.readline() != b"there\n":
                raise CannotMeasure("the hostile clients could not connect")
            yield
        finally:
            process.kill()


def control(scale: Scale) -> list[Figure]:
    """What 100 hostile clients of the control socket cost new clients."""
    with _place() as path, protector("library", "--control", path) as started:

        def beside() -> Seen:
            with _hostile(path):
                return load(started, 64, scale(3, 0.5), "--plain")

        troubled, calm = alternately(
            scale.rounds(9), beside, lambda: load(started, 64, scale(3, 0.5), "--plain")
        )
    nothing_failed(troubled + calm)
    _, rates = ratio(column(troubled, "per_second"), column(calm, "per_second"))
    _, tails = ratio(column(troubled, "p99_us"), column(calm, "p99_us"))
    return [
        Figure(
            "connections/s beside 100 control clients (98 follow events and never read, one never "
            "reads its status, one sends garbage) / without, C=64",
            rates,
            notes=[
                f"{middle_of(troubled, 'per_second'):,.0f}/s against "
                f"{middle_of(calm, 'per_second'):,.0f}; the protector's CPU a connection, "
                f"with what the clients take, {middle_of(troubled, 'parent_us'):.1f} us against "
                f"{middle_of(calm, 'parent_us'):.1f}; they want a core of their own as well",
            ],
        ),
        Figure(
            "its p99 / without",
            tails,
            notes=[
                f"{middle_of(troubled, 'p99_us') / 1e3:.1f} ms against "
                f"{middle_of(calm, 'p99_us') / 1e3:.1f}; none failed",
            ],
        ),
    ]


def everything(scale: Scale) -> list[Figure]:
    """The memory of a protector with all that can be asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path, config = f"{folder}/control", Path(folder, "all.toml")
        config.write_text(
            'workers = 4\nsettle = "100ms"\nwatchdog = "10s"\nretire-after = "1000000+-1000"\n'
            'max-memory = "1G"\nmax-age = "1h"\n'
        )
        options = ("--guard", "--config", str(config), "--control", path)
        with protector("counted", *options) as started:
            pid = guarded(started.pid)
            for _ in range(scale.rounds(5)):
                load(started, 64, scale(2, 0.5), "--plain")
                before = stamps(started.address)["generation"]
                os.kill(started.pid, signal.SIGHUP)
                _wait_for_generation(path, before + 1)
            with Asker(path) as asker:
                for _ in range(100):
                    asker.ask("status")
            resident_mb = resident_kib(pid) / 1024
    return [
        Figure(
            "resident memory of a protector with everything on (VmRSS)",
            f"{resident_mb:.1f} MB",
            "<= 18 MB",
            "",
            resident_mb <= 18,
            ["guard, configuration, control socket, scoreboard, watchdog and limits; four workers"],
        )
    ]


def _wait_for_generation(path: str, number: int) -> None:
    """Wait until it serves and those before it are gone."""
    until_s = time.monotonic() + LIMIT_S
    with Asker(path) as asker:
        while True:
            found = asker.ask("status")
            alone = [each["number"] for each in found["generations"]] == [number]
            if found["phase"] == "serving" and alone:
                return
            if time.monotonic() > until_s:
                raise CannotMeasure(f"generation {number} does not serve: {found['reloads']}")
            time.sleep(0.05)
