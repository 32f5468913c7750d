"""What is tried with each unmodified server: a column of the table in tests/servers.md each.

A trial asserts what is promised for every server, and returns what clients have seen.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.running import FAIR_START_S, Ended, Protector, eventually
from tests.scenarios.operating import pass_time
from tests.scenarios.tools import spawned
from tests.servers.catalogue import WAIT_S, Server
from tests.unit.ctl.conftest import run
from tests.web import Connection, Traffic

#: A release that never answers takes that long to be given up.
SHORT = ("--start-timeout", f"{FAIR_START_S}s", "--kill-timeout", "1s")
#: Ways to be asked.
HTTP, ACCEPT = ("--ready", "http:/"), ("--ready", "accept")
#: Exit status of socketprotectorctl where the new release does not serve.
REFUSED = 3
#: So long after its first client a release dies; a second after it, it would be kept.
DIES_AFTER_S = 0.4


@dataclass(frozen=True)
class Place:
    """Where a trial takes place, and how much of it."""

    server: Server
    start: Callable[..., Protector]
    folder: Path  # for the release
    free_port: Callable[[], int]
    reloads: int
    answers: int  # as a lame duck
    clients: int
    pause_s: float  # of each of them between its requests


@dataclass(frozen=True)
class Outcome:
    """What clients have seen, and what the operator was told."""

    answers: int
    failures: Counter[str]
    verdict: str = ""

    @property
    def cell(self) -> str:
        """For the table."""
        failed = self.failures.total()
        seen = f"{failed:,} of {failed + self.answers:,}"
        return f"{seen}; {self.verdict}" if self.verdict else seen


class Loaded:
    """A server that is started with a good release, and asked by clients until it stops."""

    def __init__(self, at: Place, *options: str, ready: tuple[str, ...] | None = None) -> None:
        words, self.release = at.server.deployed(at.folder, at.free_port, *options, ready=ready)
        self.daemon = at.start(*words, WAIT_S=WAIT_S).ready()
        address = "127.0.0.1", self.daemon.port
        self.traffic = Traffic(address, clients=at.clients, pause_s=at.pause_s)
        self.first = self.newest

    @property
    def newest(self) -> int:
        """The worker that was started last."""
        return spawned(self.daemon)[-1]

    def serves(self, worker: int) -> None:
        """Wait until a worker has answered a client."""
        self.traffic.wait_for(worker)

    def outcome(self, verdict: str = "") -> Outcome:
        seen = self.traffic.seen
        return Outcome(seen.answers.total(), seen.failures, verdict)


@contextmanager
def loaded(at: Place, *options: str, ready: tuple[str, ...] | None = None) -> Iterator[Loaded]:
    """Start a server and clients; stop it once these have ended."""
    made = Loaded(at, *options, ready=ready)
    with made.traffic:
        made.serves(made.first)
        yield made
    made.daemon.stop()


def refused(done: Ended, why: str) -> str:
    """Return what a reload that has failed says of it."""
    assert done.status == REFUSED, done
    found = re.search(why, done.err)
    assert found, done
    return f"{REFUSED}: `{found[0]}`"


def only_the_first_serves(one: Loaded) -> None:
    """So no client has reached the releases that were refused; and now a good one serves."""
    assert one.traffic.seen.workers == {one.first}, one.daemon.log.text()
    one.release.answers(200)
    one.daemon.reload()
    one.serves(one.newest)


def reloads(at: Place) -> Outcome:
    """Reload, each time when the generation before has answered.  Idle connections are ended."""
    with loaded(at) as one:
        idle = Connection(("127.0.0.1", one.daemon.port))
        idle.ask()
        for _ in range(at.reloads):
            one.daemon.reload()
            one.serves(one.newest)
        assert idle.ended(within_s=20)
        idle.close()
    assert len(one.traffic.seen.workers) == at.reloads + 1
    return one.outcome()


def answers_500(at: Place) -> Outcome:
    """It is asked by HTTP, and no client hears what it answers."""
    with loaded(at, *SHORT, ready=HTTP) as one:
        one.release.answers(500)
        verdict = refused(run("reload"), "GET /: 500")
        only_the_first_serves(one)
    return one.outcome(verdict)


def never_accepts(at: Place) -> Outcome:
    """It hangs while it loads: no connection is sent where none is accepted."""
    with loaded(at, *SHORT, ready=ACCEPT) as one:
        one.release.hangs()
        verdict = refused(run("reload"), "no worker accepted")
        only_the_first_serves(one)
    return one.outcome(verdict)


def dies(at: Place) -> Outcome:
    """It is killed just after it has got the clients, and these go back to the one before.

    Under the default, where it accepts and says nothing; one that says READY=1 needs --settle.
    """
    told = ("--settle", "1s") if at.server.tells else ("--env", "SAYS_NOTHING=1")
    with loaded(at, *told, ready=()) as one:
        mark = one.daemon.signal(signal.SIGHUP)
        one.daemon.log.wait_for("event=route generation=2", after=mark)
        pass_time(DIES_AFTER_S)
        os.kill(one.newest, signal.SIGKILL)
        line = one.daemon.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
        assert "event=reload-failed" in line
        found = re.search("was killed by SIGKILL", line)
        assert found, line
        one.daemon.log.wait_for("event=drained generation=2", after=mark)
        one.daemon.reload()
        one.serves(one.newest)
    # Each client has one request at a time, and only those of the dead process were cut.
    assert one.traffic.seen.failures.total() <= at.clients, one.traffic.seen.failures
    return one.outcome(f"`{found[0]}`")


def dry_run(at: Place) -> Outcome:
    """A good release and a bad one are tried, and no client reaches either."""
    with loaded(at, *SHORT, ready=HTTP) as one:
        good = run("reload", "--dry-run")
        assert good.status == 0, good
        one.release.answers(500)
        verdict = refused(run("reload", "--dry-run"), "GET /: 500")
        only_the_first_serves(one)
    return one.outcome(f"0 and {verdict}")


def settle_check(at: Place) -> Outcome:
    """A release that was asked too little serves, is found out, and loses its clients."""
    options = ("--settle", "30s", "--settle-check", "http:/")
    with loaded(at, *options, ready=ACCEPT) as one:
        one.release.answers(500)
        verdict = refused(run("reload"), "GET /: 500")
        seen = one.traffic.seen
        enough = seen.answers.total() + at.answers
        # gunicorn's threads answer but some twenty a second on a busy machine.
        eventually(lambda: seen.answers.total() >= enough, "answers of the one before", 300)
    assert seen.workers == {one.first}
    one.daemon.log.wait_for("event=route generation=2")  # it did serve
    assert all("500" in kind for kind in seen.failures), "none was cut off or refused"
    return one.outcome(verdict)


def lame_duck(at: Place) -> Outcome:
    """Told to stop, it serves all who come, until it is told once more."""
    with loaded(at, "--lame-duck", "1h") as one:
        mark = one.daemon.signal(signal.SIGTERM)
        one.daemon.log.wait_for("event=lame-duck ", after=mark)
        one.traffic.wait_for_answers(at.answers)
    return one.outcome()


#: By their titles in the table.
TRIALS: dict[str, Callable[[Place], Outcome]] = {
    "20 reloads": reloads,
    "answers 500": answers_500,
    "never accepts": never_accepts,
    "dies after 0.4 s": dies,
    "`--dry-run`": dry_run,
    "`--settle-check`": settle_check,
    "lame duck": lame_duck,
}
