"""Rolling reloads under --handoff listener where two generations cannot share an address's clients.

At a UNIX path the new generation gets no new clients until half of the ready workers are new, and
then all.  At a listener with one socket both generations accept.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.load import Load
from tests.rounds import rounds
from tests.running import Client, Protector, ask, eventually, shared_path
from tests.scenarios.adopting import kill_protector, revived, served, upgrade
from tests.scenarios.config_file import File
from tests.scenarios.operating import OBEYS, Operated
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import hold as stand_still
from tests.scenarios.tools import pid_in
from tests.unit.ctl.conftest import run

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener", "--guard")
ROLLING = ("--reload-order", "rolling", "--drain-timeout", "1h", "--workers", "3")
#: Each worker has several clients at a time, and declares that it can finish alone.
WORKER = (*OBEYS, "8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "web.sock"


@pytest.fixture
def one(protector: Starter, path: Path, place: Path) -> Iterator[Operated]:
    words = (*MODE, *ROLLING, "--control", place, f"unix:{path}", "--", *WORKER)
    found = Operated(protector(*words).ready(), place)
    yield found
    found.daemon.stop()
    assert list(path.parent.iterdir()) == []


class Halfway:
    """A rolling reload that stays where two of three workers are new: the path has moved."""

    def __init__(self, one: Operated, path: Path) -> None:
        self.one, self.path = one, path
        self.held = ExitStack()
        clients = self._in_each(one.pids(1))
        self.reload = Running("--control", str(one.path), "reload")
        first = self._retiring()
        assert self._replaced() == 1
        assert self.share == 0.0
        assert self.all_come_to(1)
        clients.pop(first).close()
        eventually(lambda: self._replaced() == 2, "the second new worker")
        assert self._retiring() != first
        assert self.share == 100.0

    def _in_each(self, pids: list[int]) -> dict[int, Client]:
        """Keep a client in each worker."""
        found: dict[int, Client] = {}
        while found.keys() != set(pids):
            client = self.held.enter_context(Client(str(self.path)))
            found.setdefault(pid_in(client.ask()), client)
        kept = {id(each) for each in found.values()}
        for each in list(Client.known):
            if id(each) not in kept:
                each.close()
        return found

    def _retiring(self) -> int:
        """Wait until an old worker finishes; return its pid."""
        found: list[int] = []

        def looked() -> bool:
            workers = self.one.generation(1)["workers"]
            found[:] = [each["pid"] for each in workers if each["state"] == "retiring"]
            return bool(found)

        eventually(looked, "an old worker that finishes")
        return found[0]

    @property
    def share(self) -> float:
        """The new generation's share in the status, in percent."""
        return float(self.one.status()["rollout"]["share"])

    def _replaced(self) -> int:
        return int(self.one.status().get("rollout", {}).get("replaced", 0))

    def all_come_to(self, generation: int) -> bool:
        """Return whether all of ten new clients come to one generation."""
        pids = self.one.pids(generation)
        return all(pid_in(ask(str(self.path))) in pids for _ in range(10))

    def end(self, status: int = 0) -> None:
        self.held.close()
        assert self.reload.wait() == status, self.reload.err.text()


def test_rolling_reloads_upgrades_and_kills_at_a_path_lose_no_client(
    one: Operated, path: Path
) -> None:
    with Load(f"unix:{path}") as load:
        for _ in range(rounds(2, 10)):
            one.daemon.reload()
            served(load)
        for how in ("upgrade", "kill", "both"):
            mark = one.daemon.signal(signal.SIGHUP)
            one.daemon.log.wait_for("event=route .*sharing=", after=mark)
            if how != "kill":
                assert "event=resumed" in upgrade(one.daemon)
            if how != "upgrade":
                revived(one.daemon, kill_protector(one.daemon))
            one.daemon.log.wait_for("event=reloaded", after=mark)
            served(load)

    assert load.snapshot().failures == ()


def test_the_path_leads_to_the_new_generation_once_half_of_the_workers_are_new(
    one: Operated, path: Path
) -> None:
    halfway = Halfway(one, path)
    assert halfway.all_come_to(2)

    halfway.end()
    assert halfway.all_come_to(2)
    shown = halfway.reload.err.text()
    assert "switched: 100% of new connections go to generation 2" in shown
    assert "switched: 0%" not in shown


@pytest.mark.costly
@pytest.mark.parametrize("numbers", [("1", "1"), ("2", "100%")], ids=["1", "2"])
def test_as_many_new_workers_as_old_ones_get_the_clients_while_they_settle(
    protector: Starter, path: Path, place: Path, numbers: tuple[str, str]
) -> None:
    """A release that fails at its first clients must not pass."""
    workers, surge = numbers
    words = (*MODE, *ROLLING[:-1], workers, "--surge", surge, "--settle", "1h", "--control", place)
    one = Operated(protector(*words, f"unix:{path}", "--", *WORKER).ready(), place)
    reload = Running("--control", str(place), "reload")
    eventually(
        lambda: one.status().get("rollout", {}).get("stage") == "settling", "the time of --settle"
    )
    assert one.status()["rollout"]["share"] == 100.0

    victim = pid_in(ask(str(path)))
    assert victim in one.pids(2)
    os.kill(victim, signal.SIGKILL)

    assert reload.wait() == 3, reload.err.text()
    assert pid_in(ask(str(path))) in one.pids(1)
    one.daemon.stop()


@pytest.mark.costly
@pytest.mark.parametrize("how", ["upgrade", "kill"])
def test_the_next_program_leaves_the_path_where_it_is(one: Operated, path: Path, how: str) -> None:
    halfway = Halfway(one, path)
    if how == "upgrade":
        assert "event=resumed" in upgrade(one.daemon)
    else:
        revived(one.daemon, kill_protector(one.daemon))
    one.until_generation(2, phase="settling")

    assert halfway.all_come_to(2)
    halfway.end()


@pytest.mark.costly
def test_a_rollback_gives_the_clients_back(one: Operated, path: Path) -> None:
    halfway = Halfway(one, path)
    with Load(f"unix:{path}") as load:
        assert run("--control", str(one.path), "rollback").status == 0
        assert halfway.reload.wait() == 3
        served(load)
        eventually(
            lambda: [each["state"] for each in one.generation(1)["workers"]].count("ready") == 3,
            "three old workers",
        )
    assert halfway.all_come_to(1)
    assert load.snapshot().failures == ()
    halfway.held.close()


@pytest.mark.costly
def test_a_hold_in_the_middle_ends_with_all_clients_answered(one: Operated, path: Path) -> None:
    halfway = Halfway(one, path)
    with Load(f"unix:{path}", concurrency=4) as load:
        mark = len(one.daemon.log.seen)
        assert run("--control", str(one.path), "hold", "--for", "60s").status == 0
        eventually(lambda: load.snapshot().open_now == 4, "clients that wait")
        assert run("--control", str(one.path), "release").status == 0
        one.daemon.log.wait_for("clients that waited during the hold come first", after=mark)
        served(load)
        halfway.end()
        served(load)
    assert load.snapshot().failures == ()


@pytest.mark.costly
def test_removed_files_are_made_again_in_the_middle(one: Operated, path: Path) -> None:
    halfway = Halfway(one, path)
    for each in path.parent.iterdir():
        each.unlink()
    eventually(path.exists, "the path")
    assert pid_in(ask(str(path)))

    halfway.held.close()
    halfway.reload.wait()
    one.daemon.reload()
    assert pid_in(ask(str(path))) in one.pids(one.status()["route"])


@pytest.mark.costly
def test_a_stop_in_the_middle_answers_all_that_have_connected(one: Operated, path: Path) -> None:
    halfway = Halfway(one, path)
    new = one.pids(2)
    for pid in new:
        stand_still(pid)
    waiting = [Client(str(path), f"{number}") for number in range(50)]
    mark = one.daemon.signal(signal.SIGTERM)
    one.daemon.log.wait_for("event=stopping", after=mark)
    halfway.held.close()
    for pid in new:
        os.kill(pid, signal.SIGCONT)
    for number, each in enumerate(waiting):
        assert each.hear().endswith(f"] {number}")
        each.close()
    halfway.reload.wait()


@pytest.mark.costly
def test_a_settle_check_reaches_the_new_workers_although_no_client_does(
    protector: Starter, path: Path, place: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    check = f"cat > {seen}; exit 1"
    words = (*MODE, *ROLLING, "--settle", "1h", "--settle-check", check, "--control", place)
    one = Operated(protector(*words, f"unix:{path}", "--", *WORKER).ready(), place)
    old = one.pids(1)
    reload = Running("--control", str(place), "reload")
    assert reload.wait() == 3, reload.err.text()
    assert '"new": {"number": 2' in seen.read_text(encoding="utf-8")
    assert all(pid_in(ask(str(path))) in old for _ in range(10))
    one.daemon.stop()


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["abstract", "long path", "deferred"])
def test_at_one_socket_a_rolling_reload_loses_no_client(
    protector: Starter, place: Path, path: Path, free_port: Callable[[], int], kind: str
) -> None:
    port = free_port()
    listens, address = {
        "abstract": (f"unix:@{path}", f"unix:@{path}"),
        "long path": (f"unix:{shared_path(path.parent)}", f"unix:{shared_path(path.parent)}"),
        "deferred": (f"127.0.0.1:{port}?defer_accept=5", f"127.0.0.1:{port}"),
    }[kind]
    words = (*MODE, *ROLLING, "--control", place, listens, "--", *WORKER)
    one = Operated(protector(*words).ready(), place)
    with Load(address) as load:
        for _ in range(rounds(2, 10)):
            one.daemon.reload()
            served(load)
        mark = one.daemon.signal(signal.SIGHUP)
        one.daemon.log.wait_for("event=route .*sharing=", after=mark)
        assert "event=resumed" in upgrade(one.daemon)
        one.daemon.log.wait_for("event=reloaded", after=mark)
        served(load)
    assert load.snapshot().failures == ()
    one.daemon.stop()


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_configuration_can_begin_and_end_rolling_reloads(
    protector: Starter, place: Path, path: Path, tmp_path: Path, kind: str
) -> None:
    address = f"unix:{path}" if kind == "path" else f"unix:@{path}"
    file = File(tmp_path / "web.toml")
    file.command, file.listens = WORKER, [address]
    rolling = 'reload-order = "rolling"'
    keys = 'handoff = "listener"\nworkers = 3\ndrain-timeout = "1h"\n'
    file.says(keys)
    one = Operated(protector("--control", place, "--config", file.path).ready(), place)
    with Load(address) as load:
        for more in (rolling, rolling, "", rolling):
            file.says(keys + more)
            mark = one.daemon.signal(signal.SIGHUP)
            one.daemon.log.wait_for("event=(reloaded|reload-failed)", after=mark)
            served(load)
    assert one.daemon.log.count("event=reload-failed") == 0
    assert one.daemon.log.count("event=reloaded") == 4
    assert load.snapshot().failures == ()
    one.daemon.stop()
