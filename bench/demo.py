"""`make demo`: the sample client protected, reloaded every second under load, killed now and then.

Fifteen seconds in the terminal (plain lines where there is none), then a summary.  Exit
status 0 only if nothing failed but what a killed worker held in its hands.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.load import Load
from bench.seen import KINDS, Snapshot, split_by_kills

LASTS_S = 15.0
RELOAD_EVERY_S = 1.0
KILL_EVERY_S = 4.0
SHOW_EVERY_S = 0.25
PLAIN_EVERY_S = 1.0
CONCURRENCY = 16
LASTING = 6
SHOWN_GENERATIONS = 6
INTERRUPTED = 130
_STYLES = {"starting": "yellow", "serving": "bold green", "draining": "cyan", "gone": "dim"}


@dataclass
class Generations:
    """What the protector's log says of its generations, read as it grows."""

    path: Path
    phases: dict[int, str] = field(default_factory=dict)
    pids: dict[int, list[int]] = field(default_factory=dict)  # living workers
    reloads: int = 0
    _read: int = 0

    def look(self) -> None:
        """Take in the lines that have come since the last look."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            words = dict(re.findall(r"(\w+)=([^\s\"]+)", line)) if " event=" in line else {}
            if "generation" in words:
                self._take(words["event"], int(words["generation"]), int(words.get("pid", 0)))

    def _take(self, event: str, number: int, pid: int) -> None:
        if event == "spawned":
            self.phases.setdefault(number, "starting")
            self.pids.setdefault(number, []).append(pid)
        elif event == "route":
            for other, phase in self.phases.items():
                if phase == "serving" and other != number:
                    self.phases[other] = "draining"
            self.phases[number] = "serving"
        elif event == "reloaded":
            self.reloads += 1
        elif event == "exited":
            if self.phases.get(number) != "serving":
                self.phases[number] = "gone"
                self.pids[number] = []
            else:
                self.pids[number] = self.pids[number][-1:]

    def serving(self) -> int | None:
        """The pid of the newest worker of the generation that serves."""
        for number, phase in self.phases.items():
            if phase == "serving" and self.pids[number]:
                return self.pids[number][-1]
        return None


class Demo:
    """One run: the load, the reloads, the kills, and what is seen of them."""

    def __init__(self, pid: int, address: str, log: Path) -> None:
        self.pid = pid
        self.address = address
        self.generations = Generations(log)
        self.kills: list[float] = []
        # Short ones for the rate; longer ones so that a generation is seen to drain.
        self.load = Load(address, concurrency=CONCURRENCY)
        self.lasting = Load(address, concurrency=LASTING, lines=6, pause_s=0.5)
        self.begun_s = time.monotonic()
        self._last: Snapshot | None = None
        self._per_s = 0.0

    def run(self, live: Live | None) -> None:
        """Keep everything going for LASTS_S; show it."""
        due = {
            self._reload: (RELOAD_EVERY_S, self.begun_s + RELOAD_EVERY_S),
            self._kill: (KILL_EVERY_S, self.begun_s + KILL_EVERY_S),
        }
        show_every = SHOW_EVERY_S if live else PLAIN_EVERY_S
        due[lambda: self._show(live)] = (show_every, self.begun_s + show_every)
        while (now := time.monotonic()) < self.begun_s + LASTS_S:
            for what, (every, when) in due.items():
                if now >= when:
                    due[what] = (every, when + every)
                    what()
            select.select([], [], [], max(0.0, min(w for _, w in due.values()) - now))

    def _reload(self) -> None:
        os.kill(self.pid, signal.SIGHUP)

    def _kill(self) -> None:
        self.generations.look()
        victim = self.generations.serving()
        if victim is not None:
            self.kills.append(time.monotonic())
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                self.kills.pop()  # it had just gone by itself

    def _show(self, live: Live | None) -> None:
        self.generations.look()
        now = self.load.snapshot()
        recent = now.since(self._last) if self._last else now
        since_s = now.at_s - (self._last.at_s if self._last else self.begun_s)
        self._per_s, self._last = recent.connections / max(since_s, 1e-9), now
        lasting = self.lasting.snapshot()
        held, failed = split_by_kills(now.failures + lasting.failures, self.kills)
        figures = (
            f"{now.connections + lasting.connections} connections, {self._per_s:.0f}/s, "
            f"{len(failed)} failed, "
            f"{len(held)} held by killed workers, p50 {recent.latency_us(0.5) / 1000:.2f} ms, "
            f"p99 {recent.latency_us(0.99) / 1000:.2f} ms, {self.generations.reloads} reloads"
        )
        elapsed = time.monotonic() - self.begun_s
        if live is None:
            print(f"{elapsed:4.1f} s: {figures}", flush=True)
            return
        table = Table("generation", "phase", "worker", title=f"protecting {self.address}")
        for number in list(self.generations.phases)[-SHOWN_GENERATIONS:]:
            phase = self.generations.phases[number]
            pids = " ".join(map(str, self.generations.pids[number]))
            table.add_row(str(number), Text(phase, style=_STYLES[phase]), pids)
        bar = "#" * int(elapsed / LASTS_S * 40)
        live.update(Group(table, Text(figures), Text(f"[{bar:40}] {elapsed:4.1f} s")))

    def verdict(self) -> bool:
        """End the load and print the summary; say whether everything went as promised."""
        whole, lasting = self.load.stop(), self.lasting.stop()
        self.generations.look()
        connections = whole.connections + lasting.connections
        held, failed = split_by_kills(whole.failures + lasting.failures, self.kills)
        for failure in failed:
            print(f"{failure.kind} {failure.at_s - self.begun_s:.3f} s: {failure.detail}")
        counts = {kind: whole.failed[kind] + lasting.failed[kind] for kind in KINDS}
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        print(
            f"\nby kind: {kinds or 'no failures'}; {len(self.kills)} workers killed; "
            f"latency p50 {whole.latency_us(0.5) / 1000:.2f} ms, "
            f"p99 {whole.latency_us(0.99) / 1000:.2f} ms, "
            f"longest {whole.latency_us(1.0) / 1000:.2f} ms"
        )
        print(
            f"{connections} connections, {len(failed)} failed, "
            f"{len(held)} held by killed workers, {self.generations.reloads} reloads"
        )
        return not failed and connections > 0 and self.generations.reloads > 0


@contextmanager
def protected(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """Start the protector with the sample client; stop it at the end, whatever happens."""
    log, pid_file = folder / "log", folder / "pid"
    bin_ = Path(sys.executable).parent
    started = subprocess.run(
        [
            bin_ / "SocketProtector",
            *("--pid-file", pid_file, "--log-file", log, "127.0.0.1:0"),
            *("--", bin_ / "SampleClient", "0"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(f"SocketProtector --pid-file {pid_file.name} 127.0.0.1:0 -- SampleClient 0")
    address = started.stdout.split()[-1].removeprefix("tcp:")
    pid = int(pid_file.read_text())
    end = os.pidfd_open(pid)
    try:
        yield pid, address, log
    finally:
        os.kill(pid, signal.SIGTERM)
        select.select([end], [], [])
        os.close(end)


def main() -> int:
    """Run the demo; return its exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # they clean up as Ctrl-C does
    folder = Path(tempfile.mkdtemp(prefix="socketprotector-demo-"))
    os.environ["XDG_RUNTIME_DIR"] = str(folder)  # the control socket goes there, too
    console = Console()
    try:
        with protected(folder) as (pid, address, log):
            demo = Demo(pid, address, log)
            with demo.load, demo.lasting:
                if console.is_terminal:
                    with Live(console=console) as live:
                        demo.run(live)
                else:
                    demo.run(None)
            return 0 if demo.verdict() else 1
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been stopped")
        return INTERRUPTED
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # the protector has said why
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
