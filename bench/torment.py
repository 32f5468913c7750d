"""What the soak does to a service: random actions from a seed, each counted, each undone.

The seed fixes what is done in which order and after which pauses; not what it meets.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable

from bench.account import Kill, Victim
from bench.deploys import Deploys
from bench.service import GOOD, Gone, Service, reap

#: Between two actions; short ones so that they meet each other half done.
PAUSES_S = (0.0, 0.02, 0.1, 0.5, 1.0, 2.0)
FEWEST_WORKERS = 1
_TURN_S = 0.02


class Torment:
    """Does one thing after the other to a service, and keeps the books of it."""

    def __init__(self, service: Service, seed: int, workers: int) -> None:
        """`workers`: how many it was started with."""
        self.kills: list[Kill] = []
        self.counts: Counter[str] = Counter()
        self.deploys = Deploys(service)
        self._service = service
        self._random = random.Random(seed)
        self._workers = self._workers_at_start = workers
        self._most_workers = workers + 2
        self._undo: list[tuple[float, Callable[[], None]]] = []
        self._actions: dict[Callable[[], str], int] = {
            self._reload: 6 if service.from_earlier else 2,
            self._upgrade: 5,
            self._kill_worker: 4,
            self._kill_protector: 4,
            self._bad_release: 3 if service.from_earlier else 1,
            self._scale: 3,
            self._stop_worker: 2,
            self._stop_protector: 2,
            self._stop_relay: 2,
            self._few_descriptors: 1,
            self._hold: 1,
        }
        if not service.from_earlier:
            # One reload at a time: with more of the others, hardly a deploy would have its turn.
            self._actions |= {self._dry_run: 1, self._wrong_once_settling: 1}
            self._actions |= {self._promote: 3, self._rollback: 1}
            self._actions |= {self._deploy: 6, self._bad_deploy: 4}
            if not service.rolls:
                self._actions |= {self._canary: 2, self._bad_canary: 1}
        if service.kind.forks:
            self._actions |= {self._kill_child: 4, self._kill_grandchild: 2, self._stop_child: 2}
        if not service.kind.scales:
            del self._actions[self._scale]

    def run(self, until_s: float, each_turn: Callable[[], None]) -> None:
        """Act until then.  Raises Gone when there is no service any more."""
        next_s = time.monotonic()
        while (now_s := time.monotonic()) < until_s:
            self._service.look()
            reap()
            self.deploys.look()
            self._undo_until(now_s)
            each_turn()
            if now_s >= next_s:
                chosen = self._random.choices(
                    list(self._actions), weights=list(self._actions.values())
                )[0]
                self.counts[chosen()] += 1
                next_s = time.monotonic() + self._random.choice(PAUSES_S)
            time.sleep(_TURN_S)

    def undo_all(self) -> None:
        """Let everything that was stopped, narrowed or exchanged be as it was."""
        while self._undo:
            try:
                self._undo_until(float("inf"))
            except Gone:
                continue  # a release came back after the end; the others follow

    def unguard(self) -> None:
        """Kill the guard.  From here on a kill of the protector would be an outage: no more."""
        kill = self._service.kill("guard", self._service.guard)
        if kill is None:
            raise Gone("the guard, before it was killed")
        self.kills.append(kill)
        self.counts["SIGKILL of the guard"] += 1
        del self._actions[self._kill_protector]

    def restore_workers(self) -> None:
        """Bring the number of workers back to what it was at the start.

        Living processes would mislead: the protector may be about to replace a killed worker.
        """
        if self._scale in self._actions:
            self._service.scale(self._workers_at_start)

    def _undo_until(self, now_s: float) -> None:
        for entry in [entry for entry in self._undo if entry[0] <= now_s]:
            self._undo.remove(entry)
            entry[1]()

    def _later(self, wait_s: float, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + wait_s, undo))

    # -- the actions: each says what it has done ---------------------------------

    def _reload(self) -> str:
        self._service.send(signal.SIGHUP)
        return "reload"

    def _upgrade(self) -> str:
        self._service.upgrade()
        return "upgrade (USR2)"

    def _any_worker(self) -> int:
        """Return a worker's pid: of those that serve more often than of those that drain."""
        workers = self._service.workers()
        serving = [pid for pid, number in workers.items() if number == self._service.serving]
        chosen = serving if serving and self._random.random() < 0.6 else list(workers)
        return self._random.choice(chosen) if chosen else 0

    def _kill_worker(self) -> str:
        pid = self._any_worker()
        kill = self._service.kill("worker", pid) if pid else None
        if kill is None:
            return "found nothing to kill"
        self.kills.append(kill)
        return "SIGKILL of a worker"

    def _kill_child(self) -> str:
        """Kill one of a worker's children: it holds clients, as a worker does."""
        worker = self._any_worker()
        children, _ = self._service.forked(worker)
        return self._kill_in(worker, "worker", children, "child")

    def _kill_grandchild(self) -> str:
        worker = self._any_worker()
        _, grandchildren = self._service.forked(worker)
        return self._kill_in(worker, "grandchild", grandchildren, "grandchild")

    def _kill_in(self, worker: int, victim: Victim, pids: list[int], what: str) -> str:
        pid = self._random.choice(pids) if pids else 0
        kill = self._service.kill(victim, pid, worker) if pid else None
        if kill is None:
            return "found nothing to kill"
        self.kills.append(kill)
        return f"SIGKILL of a {what}"

    def _kill_protector(self) -> str:
        pid = self._service.protector()
        kill = self._service.kill("protector", pid) if pid else None
        if kill is None:
            return "found nothing to kill"
        self.kills.append(kill)
        return "SIGKILL of the protector"

    def _bad_release(self) -> str:
        kinds = ("exits", "hangs", "not-executable")
        answers = self._service.kind.http and not self._service.from_earlier
        name = self._random.choice((*kinds, "wrong") if answers else kinds)
        self._service.release(name)
        self._service.send(signal.SIGHUP)

        def back() -> None:
            self._service.release(GOOD[0])
            self._service.send(signal.SIGHUP)

        self._later(self._random.uniform(0.2, 3.0), back)
        return f"bad release ({name}) and back"

    def _deploy(self) -> str:
        self._ordered(self._random.choice(GOOD))
        return "deploy"

    def _bad_deploy(self) -> str:
        answers = ("wrong",) if self._service.kind.http else ()
        kinds = ("exits", "exits", "not-executable", "gone", "hangs", *answers)
        name = self._random.choice(kinds)
        self._ordered(name)
        return f"deploy of a bad release ({name})"

    def _ordered(self, name: str) -> None:
        """Order a deploy or its dry run; one in four socketprotectorctl is killed meanwhile."""
        kind = self._random.choice(((), ("--force",), ("--force",), ("--dry-run",)))
        ordered = self.deploys.order(name, *kind)
        wait_s = self._random.uniform(0.0, 4.0)
        if wait_s < 1.0:
            self._later(wait_s, ordered.kill)

    def _dry_run(self) -> str:
        """Of the release that is there, which may be a bad one."""
        self._service.try_release()
        return "reload --dry-run"

    def _canary(self) -> str:
        self._service.canary(self._random.uniform(0.1, 2.0))
        return "reload --canary"

    def _bad_canary(self) -> str:
        """One that cannot start, that gives wrong answers, or whose check fails for a while."""
        answers = self._service.kind.http
        name = self._random.choice(("exits", "hangs", *(["wrong"] if answers else []), "checked"))
        if name == "checked":
            self._service.failing.touch()
        else:
            self._service.release(name)
        self._service.canary(self._random.uniform(0.5, 2.0))

        def back() -> None:
            self._service.failing.unlink(missing_ok=True)
            self._service.release(GOOD[0])

        self._later(self._random.uniform(0.5, 3.0), back)
        return f"bad canary ({name}) and back"

    def _promote(self) -> str:
        now = self._random.random() < 0.5
        self._service.promote(now=now)
        return "promote --now" if now else "promote"

    def _rollback(self) -> str:
        self._service.roll_back()
        return "rollback"

    def _hold(self) -> str:
        self._service.hold(self._random.uniform(0.1, 1.0))
        return "hold"

    def _wrong_once_settling(self) -> str:
        self._service.failing.touch()
        self._service.send(signal.SIGHUP)
        self._later(
            self._random.uniform(0.2, 3.0), lambda: self._service.failing.unlink(missing_ok=True)
        )
        return "reload whose --settle-check fails for a while"

    def _scale(self) -> str:
        up = self._random.random() < 0.5
        if self._workers <= FEWEST_WORKERS:
            up = True
        elif self._workers >= self._most_workers:
            up = False
        self._workers += 1 if up else -1
        self._service.send(signal.SIGTTIN if up else signal.SIGTTOU)
        return "one worker more (TTIN)" if up else "one worker fewer (TTOU)"

    def _stop(self, pid: int, what: str) -> str:
        if not pid:
            return "found nothing to stop"
        pidfd = -1
        try:
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        except ProcessLookupError:
            if pidfd >= 0:
                os.close(pidfd)
            return "found nothing to stop"

        def go_on() -> None:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            except ProcessLookupError:
                pass  # killed while it was stopped
            os.close(pidfd)

        self._later(self._random.uniform(0.05, 1.0), go_on)
        return f"SIGSTOP of {what}, and on"

    def _stop_worker(self) -> str:
        return self._stop(self._any_worker(), "a worker")

    def _stop_child(self) -> str:
        children, _ = self._service.forked(self._any_worker())
        return self._stop(self._random.choice(children) if children else 0, "a child")

    def _stop_protector(self) -> str:
        return self._stop(self._service.protector(), "the protector")

    def _stop_relay(self) -> str:
        """Stop it for good: the protector is to see that, or workers that print would wait."""
        pid = self._service.relay()
        if not pid:
            return "found nothing to stop"
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return "found nothing to stop"
        return "SIGSTOP of the relay"

    def _few_descriptors(self) -> str:
        """Leave the protector hardly any descriptor that it could still open.

        Not one that is being started: no program can be loaded without any.
        """
        pid = self._service.protector()
        if pid != self._service.begun:
            return "found nothing to starve"
        spare = self._random.randint(0, 4)
        try:
            used = max(map(int, os.listdir(f"/proc/{pid}/fd")))
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(hard, used + 1 + spare), hard))
        except (OSError, ValueError):
            return "found nothing to starve"

        def enough() -> None:
            if self._service.protector() == pid:
                try:
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
                except OSError:
                    pass  # it has just ended

        self._later(self._random.uniform(0.5, 2.0), enough)
        return "a moment without descriptors"
