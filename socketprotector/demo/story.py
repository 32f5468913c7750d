"""The steps of the demo, and the clients' results after each.

The demo shows only measured results.  If they are not what SocketProtector promises, the demo ends
with status 1.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from ..ctl.client import Message
from ..ctl.fields import number_in
from ..model.errors import SystemRefused
from ..model.text import escape
from ..system.cleanup import on_error
from .kill import kill
from .load import Load
from .protected import WORKERS, Protected, address_of, choose, workers_of
from .screen import Screen
from .seen import Failure, Kill, Snapshot, split_by_kills

#: Far fewer than SocketProtector can serve, so that a small machine has enough processor time and
#: ports.
PER_S = 500
CONCURRENCY = 16
#: Clients that stay for 2.5 s, so that each reload finds some that are being served.
LASTING = 6
#: A used port is free again after a second: tcp_tw_reuse on loopback.
NEEDS = (
    f"they need the loopback interface up, and {2 * PER_S:,} free local ports "
    "(sysctl net.ipv4.ip_local_port_range)"
)
SHOW_EVERY_S = 1.0
#: For a start or restart on an overloaded machine.
LIMIT_S = 60.0
_LOOK_EVERY_S = 0.05
_FAILURES_SHOWN = 10
_Found = TypeVar("_Found")


class NotAsPromised(Exception):
    """A result is not what SocketProtector promises; the text has the result."""


class Story:
    """The clients, the protected server, and the steps."""

    def __init__(self, screen: Screen, protected: Protected, pause_s: float) -> None:
        self._screen = screen
        self._protected = protected
        self._pause_s = pause_s
        self._loads: list[Load] = []
        self._shown: list[Snapshot] = []  # the last shown result of each load
        self._kills: list[Kill] = []
        self._drawn_s, self._drawn = time.monotonic(), 0

    def tell(self) -> bool:
        """Run all steps; return whether no connection failed.

        Raises NotAsPromised, and SystemRefused if this machine lacks a resource for the clients.
        """
        with ExitStack() as opened:
            opened.callback(self._hurry)
            self._start(opened)
            self._deploy()
            self._deploy_broken()
            self._kill_worker()
            self._kill_protector()
            self._hurry()
            self._stop()
        return self._verdict()

    # -- the steps ---------------------------------------------------------------

    def _start(self, opened: ExitStack) -> None:
        self._screen.say(
            f"{PER_S} clients a second use a server, and must not notice what happens to it."
        )
        self._title("Start release 1")
        words = self._protected.words
        at = words.index("--log-file")
        self._command(f"{' '.join(words[:at])} \\")
        self._screen.say(" ".join(words[at:]), "cyan", indent=8)
        status = self._wait(self._serving, "SocketProtector did not start")
        address = address_of(status)
        self._loads = [
            opened.enter_context(Load(address, concurrency=CONCURRENCY, rate_per_s=PER_S)),
            opened.enter_context(Load(address, concurrency=LASTING, lines=6, pause_s=0.5)),
        ]
        self._shown = [load.snapshot() for load in self._loads]
        self._remark(f"It is serving on {address}. From now on clients connect all the time.")
        self._watch()

    def _deploy(self) -> None:
        self._title("Deploy release 2")
        if self._reload(2) != 0:
            raise NotAsPromised("the reload failed")
        self._remark("New connections go to release 2; release 1 finishes its open ones.")
        self._watch()

    def _deploy_broken(self) -> None:
        self._title("Deploy release 3, which is broken: it imports a module that is not there")
        if self._reload(3) != 3:
            raise NotAsPromised("the broken release got clients")
        self._remark("Exit status 3. Release 2 is still serving. There is nothing to roll back.")
        self._watch()

    def _kill_worker(self) -> None:
        before = workers_of(self._status())
        victim = min(before)
        self._title("Kill a worker")
        self._kill(victim)
        now = self._wait(
            lambda: self._full(lambda workers: victim not in workers),
            "the killed worker was not replaced",
        )
        new = ", ".join(map(str, now - before))
        self._remark(f"The other worker kept serving; process {new} replaced the killed one.")
        self._watch()

    def _kill_protector(self) -> None:
        status = self._status()
        victim, before = number_in(status, "pid"), workers_of(status)
        self._title("Kill SocketProtector itself")
        self._kill(victim)
        back = self._wait(self._back_from(victim), "SocketProtector did not come back")
        same = "same workers" if workers_of(back) == before else "other workers"
        pid = number_in(back, "pid")
        self._remark(f"Its guard kept the sockets and started it again: process {pid}, {same}.")
        self._watch()

    def _stop(self) -> None:
        self._title("Stop")
        if self._run("socketprotectorctl", "stop") != 0:
            raise NotAsPromised("SocketProtector did not stop")
        self._wait(lambda: self._protected.has_ended or None, "the guard did not end")

    def _verdict(self) -> bool:
        whole = [load.join() for load in self._loads]
        ended, failed = self._split(whole)
        connections = sum(each.connections for each in whole)
        self._screen.say()
        for each in failed[:_FAILURES_SHOWN]:
            self._screen.say(f"{each.kind}: {each.detail}", "red")
        self._screen.say(
            _counts(connections, failed, ended), "bold red" if failed else "bold green"
        )
        return connections > 0 and not failed

    # -- parts of the steps ------------------------------------------------------

    def _reload(self, release: int) -> int:
        self._command(f"ln -sfn release-{release} current")
        choose(self._protected.folder, release)
        return self._run("socketprotectorctl", "reload")

    def _run(self, program: str, *words: str) -> int:
        """Run a program as a user would, show its output, and return its exit status."""
        shown = (program, "--name", self._protected.name, *words)
        self._command(" ".join(shown))
        with self._protected.run(*shown, stdout=subprocess.PIPE) as process, on_error(process.kill):
            assert process.stdout is not None
            said = b""
            while True:
                self._show()
                if not select.select([process.stdout], [], [], SHOW_EVERY_S)[0]:
                    continue
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                said += data
        for line in said.decode("utf-8", "replace").splitlines():
            self._screen.say(escape(line), indent=2)
        return process.returncode

    def _kill(self, pid: int) -> None:
        self._command(f"kill -9 {pid}")
        try:
            self._kills.append(kill(pid))
        except OSError as error:
            raise NotAsPromised(f"cannot kill {pid}: {error}") from error

    def _status(self) -> Message:
        return self._wait(self._protected.status, "SocketProtector does not answer")

    def _serving(self) -> Message | None:
        status = self._protected.status()
        return status if status and status.get("phase") == "serving" else None

    def _full(self, fact: Callable[[frozenset[int]], bool]) -> frozenset[int] | None:
        """Return the workers, if none is missing and `fact` is true for them; otherwise None."""
        workers = workers_of(self._protected.status() or {})
        return workers if len(workers) == WORKERS and fact(workers) else None

    def _back_from(self, killed: int) -> Callable[[], Message | None]:
        def back() -> Message | None:
            status = self._serving()
            return status if status and number_in(status, "pid") != killed else None

        return back

    def _wait(self, look: Callable[[], _Found | None], otherwise: str) -> _Found:
        """Wait until `look` returns a result, and return it.  Raises NotAsPromised."""
        until_s = time.monotonic() + LIMIT_S
        while (found := look()) is None:
            if self._protected.has_ended or time.monotonic() > until_s:
                raise NotAsPromised(otherwise)
            self._show()
            time.sleep(_LOOK_EVERY_S)
        return found

    def _watch(self) -> None:
        """Pause after a step; then show the clients' results since the step before."""
        until_s = time.monotonic() + self._pause_s
        while (left_s := until_s - time.monotonic()) > 0:
            self._show()
            time.sleep(min(left_s, SHOW_EVERY_S))
        now = [load.snapshot() for load in self._loads]
        since = [a.since(b) for a, b in zip(now, self._shown, strict=True)]
        self._shown = now
        ended, failed = self._split(since)
        slowest_ms = max(each.latency_us(1.0) for each in since) / 1000
        text = _counts(sum(each.connections for each in since), failed, ended)
        text += f"; slowest answer: {slowest_ms:.0f} ms"
        self._screen.say(text, "red" if failed else "green", indent=2)

    def _hurry(self) -> None:
        for load in self._loads:
            load.hurry()

    def _split(self, loads: list[Snapshot]) -> tuple[list[Failure], list[Failure]]:
        """Return the failures (of connections that a killed process held, all others).

        Raises SystemRefused for a failure of the clients' own, which makes the others meaningless.
        """
        failures = [failure for load in loads for failure in load.failures]
        for each in failures:
            if each.kind == "local":
                raise SystemRefused(f"this machine cannot run the clients: {each.detail}; {NEEDS}")
        return split_by_kills(failures, self._kills)

    # -- what is shown -----------------------------------------------------------

    def _title(self, text: str) -> None:
        self._screen.say()
        self._screen.say(text, "bold")

    def _command(self, text: str) -> None:
        self._screen.say(f"$ {text}", "cyan", indent=2)

    def _remark(self, text: str) -> None:
        self._screen.say(text, indent=2)

    def _show(self) -> None:
        """Redraw the current figures, at most every SHOW_EVERY_S."""
        since_s = time.monotonic() - self._drawn_s
        if since_s < SHOW_EVERY_S or not self._loads:
            return
        now = [load.snapshot() for load in self._loads]
        count = sum(each.connections for each in now)
        _, failed = self._split(now)
        per_s = (count - self._drawn) / since_s
        self._drawn_s, self._drawn = self._drawn_s + since_s, count
        self._screen.now(f"{len(failed)} failed   {count:,} so far   {per_s:,.0f} connections/s")


def _counts(connections: int, failed: list[Failure], ended: list[Failure]) -> str:
    """Return in words how connections ended.  ended: the failures that a kill of ours caused."""
    cut = f", {len(ended)} cut by our kill -9" if ended else ""
    return f"{connections:,} connections, {len(failed)} failed{cut}"
