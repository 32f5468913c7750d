"""A real instance that is attacked, and what must hold meanwhile: the invariants of every attack.

* a client of the service waits at most a quarter of a second longer than without the attack;
* the product's processes grow by less than 20 MB, and have the descriptors that they had before;
* of each kind there is at most one line in the log;
* the instance is listed, reloads and takes signals, as it did before: the positive control.

What a client waits is counted without the time in which the processor had no room for those who
serve it.  An attack that holds clients up does so each time: one quick round of them shows that it
does not, so the machine's load decides no test.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

from socketprotector.ctl import discovery
from socketprotector.ctl.query_all import query_all
from tests import needs
from tests.procfs import GONE, command_line_of, kinds_of, memory_kib, parent_of
from tests.running import MARK, ask, eventually, marked
from tests.scenarios.starting import Start
from tests.scenarios.tools import Release, no_more_open, worker
from tests.scenarios.users import A, B

LONGER_S = 0.25
GROWTH_KIB = 20 * 1024
CLIENTS, ROUNDS = 4, 3
GOOD = worker("many")
NAME = "good"
#: An old generation's workers end soon, whatever they do.
QUICK = ("--drain-timeout", "0.1s", "--kill-timeout", "0.1s", "--stop-timeout", "1s")
#: Lines of an instance's ordinary life, of which each reload brings some.
ORDINARY = frozenset(
    {
        *("spawned", "worker-ready", "exited", "route", "signal", "reloading", "reloaded"),
        *("drained", "retired", "signalled", "reopened", "reload-failed", "scaled", "resumed"),
    }
)


def users() -> tuple[str, ...]:
    """Return the options that isolate the protector from its workers, where they can be had."""
    isolated = needs.IS_ROOT and needs.others_can_run()
    return ("--user", A, "--worker-user", B) if isolated else ()


def run_delay_s(task: str) -> float:
    """Return how long a thread has waited for a processor so far: proc_pid_schedstat(5)."""
    try:
        return int(Path(f"/proc/{task}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except GONE:
        return 0.0


class Attacked:
    """One instance, detached, with a release that tests exchange."""

    def __init__(self, start: Start, control: Path) -> None:
        self.start, self.control = start, control
        self.release = Release(start.folder / "daemon.sh")
        self.release.becomes(*GOOD)
        self.socket = f"{start.folder}/s"
        self.usual_s = 0.0

    def up(self, *options: str | Path, isolated: bool = True) -> Attacked:
        """Start it.  isolated: as users of its own, if root starts it."""
        settings = (*QUICK, *(users() if isolated else ()), "--name", NAME)
        service = ("unix:s?mode=0666", "127.0.0.1:0", "--", self.release.path)
        self.start.up(*settings, "--control", self.control, *options, *service)
        self.usual_s = min(self._longest() for _ in range(2))
        started = self.start.log.count("event=spawned")
        relays = [pid for pid in self.processes() if "log_relay" in command_line_of(pid)]
        for pid in relays:  # it begins while the first workers do
            eventually(lambda pid=pid: kinds_of(pid).get("pipe") == started, "all pipes")  # type: ignore[misc]
        return self

    # -- its processes -----------------------------------------------------------

    def processes(self) -> list[int]:
        """Return those of the product: neither workers nor what these have started."""
        found = []
        for pid in marked(self.start.environment[MARK]):
            words = command_line_of(pid)
            if "socketprotector" in words and "/tests/workers/" not in words:
                found.append(pid)
        return found

    @property
    def protector(self) -> int:
        """Return the one that has the workers: the guard's child, if there is a guard."""
        own = self.processes()
        children = [pid for pid in own if parent_of(pid) == self.start.pid]
        programs = [pid for pid in children if "log_relay" not in command_line_of(pid)]
        return programs[0] if programs else self.start.pid

    def strays(self) -> list[int]:
        """Return what workers have left in sessions of their own."""
        known = {*map(int, re.findall(r"event=spawned .*\bpid=(\d+)", self.start.log))}
        there = marked(self.start.environment[MARK])
        return [pid for pid in there if pid not in {*self.processes(), *known}]

    @contextmanager
    def room_for(self, descriptors: int) -> Iterator[None]:
        """Let the protector, of this user, open so many more, and no further one."""
        pid = self.protector
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        open_ones = {int(each) for each in os.listdir(f"/proc/{pid}/fd")}
        free = (each for each in count() if each not in open_ones)
        most = max(next(islice(free, descriptors, None)), *open_ones)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
        yield
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    def workers(self, generation: int) -> list[int]:
        """Return the workers of a generation, once one was started."""
        self.start.wait_for(f"event=spawned generation={generation} ")
        found = re.findall(rf"event=spawned generation={generation} .*\bpid=(\d+)", self.start.log)
        return [int(each) for each in found]

    # -- the invariants ------------------------------------------------------------

    @contextmanager
    def unharmed(self, *others: int) -> Iterator[None]:
        """Check that an attack, which has ended when the block ends, has left nothing.

        others: processes that are attacked, too.
        """
        own = [*self.processes(), *others]
        before = {pid: memory_kib(pid) for pid in own}
        descriptors = {pid: kinds_of(pid) for pid in own}
        began = len(self.lines())
        yield
        kinds = Counter(re.findall(r"\bevent=(\S+)", "\n".join(self.lines()[began:])))
        said = {kind: n for kind, n in kinds.items() if n > 1 and kind not in ORDINARY}
        assert not said, "more than one line of a kind"
        for pid in own:
            assert memory_kib(pid) < before[pid] + GROWTH_KIB, command_line_of(pid)
            no_more_open(descriptors[pid], pid)

    def lines(self) -> list[str]:
        """Return the protector's own lines of the log so far."""
        return [line for line in self.start.log.splitlines() if re.match(r"\S+ \S+ event=", line)]

    def serves(self) -> None:
        """See that clients wait no longer than usual, for all that is going on."""
        waits = []
        for _ in range(ROUNDS):
            waits.append(self._longest())
            if waits[-1] < self.usual_s + LONGER_S:
                return
        raise AssertionError(f"the longest waits: {waits} s; before: {self.usual_s} s")

    def _longest(self) -> float:
        return max(self._wait() for _ in range(CLIENTS))

    def _wait(self) -> float:
        tasks = [f"{self.protector}", "thread-self"]
        without, began = sum(map(run_delay_s, tasks)), time.monotonic()
        assert ask(self.socket).endswith("] hello")
        return time.monotonic() - began - (sum(map(run_delay_s, tasks)) - without)

    def is_listed(self) -> None:
        """See that an operator finds it, and is answered: again, where others crowd its socket."""
        [path] = [each for each in discovery.sockets() if Path(each).name == self.control.name]

        def answers() -> bool:
            [found] = query_all([path], 10.0)
            return found.result is not None and found.result["name"] == NAME

        eventually(answers, "its answer")

    def works(self) -> None:
        """See that it is listed, reloads and takes a signal: the positive control."""
        self.is_listed()
        self.start.reload()
        seen = self.start.log.count("event=reopened")
        self.start.send(signal.SIGUSR1)
        eventually(lambda: self.start.log.count("event=reopened") > seen, "a log that is reopened")
        assert ask(self.socket).endswith("] hello")
