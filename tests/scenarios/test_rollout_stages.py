"""What may happen in each stage of a rollout: no client fails, and the verdict is right.

`make test` runs each test in one stage, `make test-all` in all of them under both handoffs.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.load import Load
from tests.running import Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import kill_protector, protector_pid, revived, served, upgrade
from tests.scenarios.config_file import File
from tests.scenarios.operating import OBEYS, Line, Operated, Operating
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import EITHER_HANDOFF, pid_in

#: Each worker has several clients at a time, and declares that it can finish alone.
WORKER = (*OBEYS, "8")
WORKERS = 2
CLIENTS = 4  # of the load
CANARY = ("--settle", "1h")
ROLLING = ("--reload-order", "rolling", "--drain-timeout", "1h")
OPTIONS = {
    "share": CANARY,
    "all": CANARY,
    "settling": (*ROLLING, "--settle", "1h"),
    "replacing": ROLLING,
}
STAGE = pytest.mark.parametrize("stage", OPTIONS)
HALF = ("--canary", "50%", "--for", "1h")
CALLED_OFF = "called off: the protector is stopping"


class Rollout:
    """A reload that stays in one stage, with clients in all old workers and in a new one."""

    def __init__(self, one: Operated, stage: str) -> None:
        self.one, self.stage = one, stage
        self.held: dict[int, Client] = {}
        self._hold_in(*one.pids(1))
        self.load = self.loaded()
        words = HALF if self.is_canary else ()
        self.reload = Running("--control", str(one.path), "reload", *words)
        self._come_to_stage(2)
        self._hold_in(one.pids(2)[0])

    @property
    def is_canary(self) -> bool:
        return self.stage in ("share", "all")

    def loaded(self) -> Load:
        """Begin a load."""
        self.load = Load(f"127.0.0.1:{self.one.address[1]}", concurrency=CLIENTS)
        return self.load.start()

    def order(self, command: str, **arguments: object) -> None:
        with Line(self.one.path) as line:
            line.ask(command, **arguments)

    def found(self) -> str:
        """The present stage; "" without a rollout."""
        return str(self.one.status().get("rollout", {}).get("stage", ""))

    @property
    def left_s(self) -> float:
        """How long the stage still takes; 0.0: no timer ends it."""
        return float(self.one.status()["rollout"]["left_s"] or 0.0)

    def held_back(self) -> None:
        """Begin a hold; clients wait, and the stage stays."""
        self.order("hold", seconds=60)
        waits = [each["kind"] for each in self.one.status()["waits_for"]]
        assert "hold" in waits
        at_rest = self.load.snapshot().connections + CLIENTS  # each may have been taken before
        eventually(lambda: self.load.snapshot().open_now == CLIENTS, "clients that wait")
        assert self.found() == self.stage
        assert self.load.snapshot().connections <= at_rest

    def stays(self, number: int = 2) -> None:
        """See that the generation is in this stage, that clients are served, and theirs live."""
        eventually(lambda: self.found() == self.stage, f"the stage {self.stage}")
        assert self.one.status()["rollout"]["generation"] == number
        served(self.load, 5)
        assert {pid: pid_in(each.ask()) for pid, each in self.held.items()} == {
            pid: pid for pid in self.held
        }

    def _hold_in(self, *pids: int) -> None:
        """Hold a client in each of these workers."""
        while missing := {*pids} - self.held.keys():
            client = Client(self.one.address)
            pid = pid_in(client.ask())
            if pid in missing:
                self.held[pid] = client
            else:
                client.close()

    def _come_to_stage(self, number: int) -> None:
        if self.stage == "all":
            eventually(lambda: self.found() == "share", "the share")
            self.order("promote")
        eventually(lambda: self.found() == self.stage, f"the stage {self.stage}")
        if self.stage == "replacing":
            eventually(
                lambda: any(
                    each["state"] == "retiring" for each in self.one.generation(1)["workers"]
                ),
                "an old worker that finishes",
            )

    def settles(self, number: int) -> None:
        """Wait until a later generation settles."""
        eventually(
            lambda: (
                (number, "settling")
                in [(each["number"], each["phase"]) for each in self.one.status()["generations"]]
            ),
            f"generation {number} that settles",
        )

    def end_stage(self) -> None:
        """Let this generation become the one that serves."""
        if self.is_canary:
            self.order("promote", now=True)
        elif self.stage == "settling":
            self.order("promote")
        self.let_go()

    def let_go(self) -> None:
        for each in self.held.values():
            each.close()
        self.held.clear()

    def succeeds(self, *, workers: int = WORKERS, most: int = 0) -> None:
        """End it well: its verdict, the old generation's end, the bound, and no failed client."""
        self.end_stage()
        assert self.reload.wait() == 0, self.reload.err.text()
        self.is_over(2, workers=workers, most=most)

    def is_over(self, number: int, *, workers: int = WORKERS, most: int = 0) -> None:
        """See that one generation is left with all of its workers, and what it took to come there.

        most: the bound of processes, if the number of workers has changed.
        """
        one = self.one
        eventually(lambda: [g["number"] for g in one.status()["generations"]] == [number], "one")
        eventually(
            lambda: [w["state"] for w in one.generation(number)["workers"]] == ["ready"] * workers,
            f"{workers} workers of generation {number}",
        )
        served(self.load, 5)
        seen = self.load.stop()
        assert seen.failures == ()
        assert not one.status()["lost"]  # None where workers accept
        assert most_processes(one) <= (most or (2 * WORKERS if self.is_canary else WORKERS + 1))
        assert {pid_in(ask(one.address)) for _ in range(6)} <= {*one.pids(number)}

    def close(self) -> None:
        self.load.stop()
        self.let_go()
        self.reload.end()
        self.one.end()


def most_processes(one: Operated) -> int:
    """Return how many workers lived at a time at most, by the log."""
    living: set[str] = set()
    most = 0
    for line in list(one.daemon.log.seen):
        if found := re.search(r"event=(spawned|exited) .*\bworker=(\d+)", line):
            (living.add if found[1] == "spawned" else living.discard)(found[2])
        most = max(most, len(living))
    return most


#: Begins a rollout and leaves it in a stage: rollout(stage, *options).
Beginning = Callable[..., Rollout]
Starter = Callable[..., Protector]


@pytest.fixture
def rollout(operated: Operating) -> Iterator[Beginning]:
    begun: list[Rollout] = []

    def begin(stage: str, *options: str | Path, one: Operated | None = None) -> Rollout:
        words = ("--workers", str(WORKERS), *OPTIONS[stage], *options)
        begun.append(Rollout(one or operated(*words, command=WORKER), stage))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()


# -- holds, scale, the log -----------------------------------------------------------------


@EITHER_HANDOFF
@STAGE
@pytest.mark.costly
def test_a_hold_begins_and_ends_in_a_stage(rollout: Beginning, stage: str) -> None:
    begun = rollout(stage)
    left_s = begun.left_s
    begun.held_back()

    begun.order("release")

    assert begun.left_s <= left_s
    begun.stays()
    begun.succeeds()
    begun.one.daemon.stop()


@EITHER_HANDOFF
@STAGE
@pytest.mark.costly
def test_a_stage_ends_while_clients_are_held(rollout: Beginning, stage: str) -> None:
    begun = rollout(stage)
    begun.held_back()
    begun.end_stage()
    begun.one.until_generation(2, phase="serving")

    begun.order("release")

    assert begun.reload.wait() == 0, begun.reload.err.text()
    begun.is_over(2)
    begun.one.daemon.stop()


@EITHER_HANDOFF
@STAGE
@pytest.mark.costly
def test_scale_up_and_down_in_a_stage(rollout: Beginning, stage: str) -> None:
    begun = rollout(stage)

    begun.order("scale", to=WORKERS + 1)
    begun.stays()
    begun.order("scale", to=1)

    begun.succeeds(workers=1, most=2 * (WORKERS + 1) if begun.is_canary else WORKERS + 2)
    begun.one.daemon.stop()


@EITHER_HANDOFF
@STAGE
@pytest.mark.costly
def test_the_log_is_opened_again_in_a_stage(rollout: Beginning, stage: str, tmp_path: Path) -> None:
    begun = rollout(stage)
    mark = begun.one.daemon.signal(signal.SIGUSR1)
    begun.one.daemon.log.wait_for("event=reopened", after=mark)
    begun.stays()
    begun.succeeds()
    begun.one.daemon.stop()


# -- the protector or its guard is replaced or killed ----------------------------------------


@EITHER_HANDOFF
@STAGE
@pytest.mark.parametrize("how", ["upgrade", "protector killed", "guard killed"])
def test_a_stage_goes_on_in_the_next_program(
    rollout: Beginning, stage: str, how: str, handoff: str
) -> None:
    begun = rollout(stage, "--guard")
    daemon, allowed = begun.one.daemon, 0
    if how == "upgrade":
        assert "event=resumed" in upgrade(daemon)
    elif how == "protector killed":
        revived(daemon, kill_protector(daemon))
        # The connection between accept and send.  Workers that accept by themselves lose none.
        allowed = 1 if handoff == "connection" else 0
    else:
        daemon.process.kill()
        daemon.log.wait_for("event=guard-died")

    begun.stays()
    failures = begun.load.snapshot().failures
    assert len(failures) <= allowed, failures
    begun.end_stage()
    assert begun.reload.wait() == 0, begun.reload.err.text()
    assert len(begun.load.stop().failures) <= allowed
    begun.loaded()
    begun.is_over(2)
    if how == "guard killed":
        mark = len(daemon.log.seen)
        os.kill(protector_pid(daemon), signal.SIGTERM)
        daemon.log.wait_for("event=stopped", after=mark)
        assert wait_gone([protector_pid(daemon)]) == []
    else:
        daemon.stop()


@EITHER_HANDOFF
@STAGE
@pytest.mark.costly
def test_workers_finish_when_the_protector_is_killed_without_a_guard(
    rollout: Beginning, stage: str
) -> None:
    begun = rollout(stage)
    one = begun.one
    pids = [*one.pids(1), *one.pids(2)]
    begun.load.stop()

    one.daemon.process.kill()
    one.daemon.process.wait()

    assert {pid: pid_in(each.ask()) for pid, each in begun.held.items()} == {
        pid: pid for pid in begun.held
    }
    begun.let_go()
    assert wait_gone(pids) == []
    assert begun.reload.wait() not in (0, 3)


# -- stops, failures and further reloads ---------------------------------------------------


@EITHER_HANDOFF
@STAGE
@pytest.mark.parametrize("how", ["graceful", "quick"])
def test_a_stop_in_a_stage_calls_the_rollout_off(rollout: Beginning, stage: str, how: str) -> None:
    begun = rollout(stage)
    daemon = begun.one.daemon
    assert begun.load.stop().failures == ()

    mark = daemon.signal(signal.SIGTERM if how == "graceful" else signal.SIGINT)

    daemon.log.wait_for("event=reload-failed generation=2 .*called off", after=mark)
    if how == "graceful":
        assert {pid: pid_in(each.ask()) for pid, each in begun.held.items()} == {
            pid: pid for pid in begun.held
        }
        begun.let_go()
    assert begun.reload.wait() == 3
    assert CALLED_OFF in begun.reload.err.text()
    assert daemon.wait() == 0
    if how == "graceful":
        lost = re.findall(r"event=exited .*\blost=(\d+)", daemon.log.text())
        assert [each for each in lost if each != "0"] == []


@EITHER_HANDOFF
@STAGE
@pytest.mark.parametrize("how", ["died", "rolled back"])
@pytest.mark.costly
def test_a_failure_in_a_stage_gives_all_clients_back(
    rollout: Beginning, stage: str, how: str
) -> None:
    begun = rollout(stage)
    if how == "died":
        [new] = [pid for pid in begun.one.pids(2) if pid in begun.held]
        begun.load.stop()  # the clients of that worker would fail
        begun.held.pop(new).close()
        os.kill(new, signal.SIGKILL)
    else:
        begun.order("rollback")

    assert begun.reload.wait() == 3
    said = "SIGKILL" if how == "died" else "rolled back"
    assert said in begun.reload.err.text()
    if how == "died":
        assert begun.load.snapshot().failures == ()
        begun.loaded()
    served(begun.load, 5)
    begun.let_go()
    begun.is_over(1)
    begun.one.daemon.stop()


@EITHER_HANDOFF
@STAGE
@pytest.mark.parametrize("first", ["ends well", "is rolled back"])
@pytest.mark.costly
def test_a_second_reload_follows_the_first(rollout: Beginning, stage: str, first: str) -> None:
    begun = rollout(stage)
    line = begun.one.line(follows=True)
    line.ask("reload")
    begun.stays()

    if first == "ends well":
        begun.end_stage()
        assert begun.reload.wait() == 0, begun.reload.err.text()
    else:
        begun.order("rollback")
        assert begun.reload.wait() == 3
        begun.let_go()

    if stage != "replacing":
        begun.settles(3)
        begun.order("promote", now=begun.is_canary)
    line.event("reloaded", generation=3)
    begun.is_over(3, most=3 * WORKERS if begun.is_canary else 0)
    begun.one.daemon.stop()


@EITHER_HANDOFF
@STAGE
@pytest.mark.costly
def test_listeners_added_and_removed_during_a_stage_follow_it(
    rollout: Beginning,
    protector: Starter,
    place: Path,
    stage: str,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    kept, old, new = (f"127.0.0.1:{free_port()}" for _ in range(3))
    file = File(tmp_path / "web.toml")
    file.command, file.listens = WORKER, [kept, old]
    file.says(f"workers = {WORKERS}")
    words = ("--control", place, "--config", file.path, *OPTIONS[stage])
    one = Operated(protector(*words), place)
    one.line()
    one.until("phase", "serving")
    begun = rollout(stage, one=one)
    file.listens = [kept, new]
    file.says(f"workers = {WORKERS}")
    one.daemon.signal(signal.SIGHUP)
    begun.stays()
    assert pid_in(ask(at(old)))

    begun.end_stage()
    assert begun.reload.wait() == 0, begun.reload.err.text()
    if stage != "replacing":
        begun.settles(3)
        begun.order("promote", now=begun.is_canary)
    begun.is_over(3, most=3 * WORKERS if begun.is_canary else 0)

    assert pid_in(ask(at(new))) in one.pids(3)
    with pytest.raises(ConnectionRefusedError):
        ask(at(old))
    one.daemon.stop()


def at(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host, int(port)
