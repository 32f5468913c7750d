"""The control socket of the real protector: answers are true, and commands are carried out."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from socketprotector_exporter.counters import Counters

from socketprotector import __version__
from socketprotector.launch.user_access import as_user
from socketprotector.model.control_requests import COMMANDS
from socketprotector.model.settings import Identity
from socketprotector.system.control_path import sockets
from tests import forked
from tests.load import Load
from tests.running import DEADLINE_S, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import AS_ANOTHER_USER, kill_protector, revived, served, upgrade
from tests.scenarios.operating import MANY, OBEYS, Line, Operated, Operating, default_path
from tests.scenarios.tools import EITHER_HANDOFF, Gate, Release, hold, pid_in, spawned

Starter = Callable[..., Protector]
NOBODY = 65_534


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "daemon")
    made.becomes(*MANY)
    return made


# -- status ----------------------------------------------------------------------


def test_status_of_one_that_serves(operated: Operating, place: Path) -> None:
    web = operated("--name", "web", "--workers", "2", "--queue", "100")
    found = web.status()

    assert (found["name"], found["phase"], found["version"]) == ("web", "serving", __version__)
    assert found["pid"] == found["main_pid"] == web.daemon.pid
    assert found["control"] == str(place)
    assert found["command"] == [os.path.basename(MANY[0])]
    assert found["started_at"] <= found["now"]
    assert (found["restarts"], found["crashes"], found["reloads"]) == (0, 0, [])
    assert (found["held_s"], found["guarded"], found["reload_wanted"]) == (None, False, False)
    assert (found["ready"], found["handoff"], found["log_level"]) == (
        "notify",
        "connection",
        "info",
    )
    assert (found["workers_wanted"], found["route"]) == (2, 1)
    assert (found["forwarded"], found["lost"]) == (0, 0)
    assert found["queue_limit"] >= 100
    assert found["listeners"] == [
        {
            "index": 0,
            "address": web.daemon.addresses[0],
            "name": "0",
            "backlog": 0,
            "backlog_limit": 4096,
            "reachable": True,
        }
    ]
    [generation] = found["generations"]
    assert (generation["number"], generation["phase"], generation["queue"]) == (1, "serving", 0)
    assert generation["path"] == os.path.realpath(MANY[0]) or generation["path"] == MANY[0]
    assert generation["opened_at"] <= generation["serving_since_at"] <= found["now"]
    assert [each["pid"] for each in generation["workers"]] == spawned(web.daemon)
    for slot, each in enumerate(generation["workers"]):
        assert (each["slot"], each["state"], each["quick_deaths"]) == (slot, "ready", 0)
        assert each["started_at"] <= each["ready_at"] <= found["now"]


@EITHER_HANDOFF
def test_status_of_a_first_start_and_of_a_reload(
    operated: Operating, release: Release, gate: Gate
) -> None:
    release.becomes(*gate.before(*MANY))
    web = operated(command=(str(release.path),), ready=False)
    line = web.line(follows=True)

    found = line.status()
    assert (found["phase"], found["route"], found["queue_limit"]) == ("starting", None, None)
    [first] = found["generations"]
    assert (first["phase"], first["serving_since_at"]) == ("starting", None)
    assert [(each["state"], each["ready_at"]) for each in first["workers"]] == [("starting", None)]
    gate.open()
    line.event("ready", generation=1)
    assert line.status()["phase"] == "serving"

    with Client(web.address, "hello") as client:
        client.hear()
        assert line.ask("reload") == {"generation": 2}
        found = line.status()
        assert (found["phase"], found["route"]) == ("reloading", 1)
        [reload] = found["reloads"]
        assert (reload["generation"], reload["result"]) == (2, "running")
        assert (reload["reason"], reload["ended_at"]) == ("", None)
        gate.open()
        line.event("reloaded", generation=2)

        found = line.status()
        assert (found["phase"], found["route"]) == ("serving", 2)
        [reload] = found["reloads"]
        assert (reload["result"], reload["reason"]) == ("reloaded", "")
        assert reload["began_at"] <= reload["ended_at"] <= found["now"]
        old, new = found["generations"]
        assert (old["phase"], new["phase"]) == ("draining", "serving")
        assert old["draining_since_at"] >= new["serving_since_at"] - 1
    line.event("drained", generation=1)
    assert [each["number"] for each in line.status()["generations"]] == [2]


@pytest.mark.costly
def test_status_of_one_that_settles_and_is_rolled_back(
    operated: Operating, release: Release
) -> None:
    web = operated("--settle", "1000", command=(str(release.path),), ready=False)
    line = web.line(follows=True)
    eventually(lambda: line.status()["phase"] in ("settling", "serving"), "a first generation")
    line.ask("reload")
    line.event("route", generation=2)
    assert line.status()["phase"] == "settling"
    assert line.status()["reloads"][-1]["result"] == "running"

    os.kill(web.pids(2)[0], signal.SIGKILL)

    failed = line.event("reload-failed", generation=2)
    assert "SIGKILL" in failed["reason"]
    last = line.status()["reloads"][-1]
    assert (last["result"], last["reason"]) == ("failed", failed["reason"])


@EITHER_HANDOFF
@pytest.mark.costly
def test_status_while_it_stops_and_what_it_then_refuses(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)
    with Client(web.address, "hello") as client:
        client.hear()
        assert line.ask("stop") == {}
        line.event("stopping")

        assert line.status()["phase"] == "stopping"
        for command, arguments in (
            ("reload", {}),
            ("upgrade", {}),
            ("scale", {"to": 2}),
            ("hold", {"seconds": 1}),
            ("lame-duck", {"on": True}),
            ("replace", {"generation": 1}),
        ):
            assert line.refused(command, **arguments) == ("refused", "a stop is in progress")
        assert client.ask() == f"[{spawned(web.daemon)[0]}] hello"
    line.event("stopped")
    assert line.hear() == {}
    assert web.daemon.wait() == 0


# -- what workers count -------------------------------------------------------------


def test_what_workers_with_the_library_count_is_right(operated: Operating) -> None:
    web = operated(command=(*OBEYS, "8"))
    for _ in range(5):
        ask(web.address)
    with Client(web.address, "fail") as failing:
        assert failing.hear() == ""
    with Client(web.address, "one") as one, Client(web.address, "two") as two:
        one.hear()
        two.hear()
        found = web.until_generation(1, active=2)

        assert (found["accepted"], found["finished"], found["errors"]) == (8, 6, 1)
        assert (found["lost"], found["queue"]) == (0, 0)
        waits = found["wait_us"]
        assert waits["count"] == sum(waits["buckets"]) == 8
        assert len(waits["buckets"]) == 32
        assert 0 <= waits["p50"] <= waits["p99"] < 30_000_000
        [each] = found["workers"]
        assert [each[name] for name in ("accepted", "active", "finished", "errors")] == [8, 2, 6, 1]
    found = web.until_generation(1, active=0)
    assert (found["accepted"], found["finished"]) == (8, 8)
    assert web.status()["forwarded"] == 8


@pytest.mark.costly
def test_after_a_kill_the_count_of_connections_goes_on_from_what_status_has_shown(
    operated: Operating,
) -> None:
    web, counters = operated("--guard"), Counters()
    with Load(f"127.0.0.1:{web.address[1]}", concurrency=4) as load:
        served(load)
        before = web.status()
        revived(web.daemon, kill_protector(web.daemon))
        after = web.until("restarts", 1)
        served(load)
        later = web.status()

    assert 0 < before["forwarded"] <= after["forwarded"] < later["forwarded"]
    for each in (before, after, later):  # a counter that waited for the others would stay the same
        counters.see(each)
        assert counters.forwarded == each["forwarded"]


@pytest.mark.parametrize("handoff", ["listener"], indirect=True)
def test_where_workers_with_the_library_accept_they_count_too(operated: Operating) -> None:
    web = operated(command=(*OBEYS, "8"))
    for _ in range(5):
        ask(web.address)
    with Client(web.address, "fail") as failing:
        assert failing.hear() == ""
    with Client(web.address, "one") as one:
        one.hear()
        found = web.until_generation(1, active=1)

        assert (found["accepted"], found["finished"], found["errors"]) == (7, 6, 1)
        assert (found["lost"], found["queue"]) == (0, 0)
        assert found["wait_us"]["count"] == 7
        [where] = web.line().ask("connections")["workers"]
        assert where["accepted_at_by_fd"]


@pytest.mark.parametrize("handoff", ["listener"], indirect=True)
def test_of_unmodified_servers_the_kernel_counts_served_and_waiting_clients(
    operated: Operating,
) -> None:
    web = operated("--guard")
    with Client(web.address, "one") as one:
        one.hear()
        web.daemon.reload()
        with Client(web.address, "two") as two, Client(web.address, "three") as three:
            two.hear()
            three.hear()
            web.until_generation(1, active=1, queue=0)
            assert "event=resumed" in upgrade(web.daemon)
            web.until_generation(2, active=2, queue=0)
            revived(web.daemon, kill_protector(web.daemon))
            web.line()
            web.until_generation(1, active=1)
            [serving] = web.pids(2)
            hold(serving)
            with Client(web.address, "four"), Client(web.address, "five"):
                web.until_generation(2, active=2, queue=2)
                os.kill(serving, signal.SIGCONT)
                web.until_generation(2, active=4, queue=0)
        web.until_generation(2, active=0)


@pytest.mark.parametrize("handoff", ["listener"], indirect=True)
def test_where_workers_accept_nothing_is_reported_of_connections_that_it_never_saw(
    operated: Operating,
) -> None:
    web = operated()
    for _ in range(3):
        ask(web.address)
    web.until_generation(1, active=0)  # it may be late to close the last one

    found = web.status()

    assert (found["forwarded"], found["lost"], found["queue_limit"]) == (None, None, None)
    [generation] = found["generations"]
    for name in ("oldest_waiting_s", "accepted", "finished", "errors", "lost", "wait_us"):
        assert generation[name] is None, name
    assert (generation["queue"], generation["active"]) == (0, 0)
    web.daemon.stop()
    assert not re.search(r"connections=|lost=", web.daemon.log.wait_for("event=stopped"))


@pytest.mark.costly
def test_what_one_worker_does_not_count_is_unknown_of_its_generation(operated: Operating) -> None:
    """One that has counted is dead, and what has come in its place does not: no sum of the rest."""
    counts = shlex.join((*OBEYS, "8"))
    script = f'test -e "$0" && exec "$@"; : > "$0"; exec {counts}'
    once = Path(os.environ["XDG_RUNTIME_DIR"]) / "once"
    web = operated(command=("/bin/sh", "-c", script, str(once), *MANY))
    ask(web.address)
    web.until_generation(1, accepted=1)
    os.kill(web.pids(1)[0], signal.SIGKILL)
    web.daemon.log.wait_for("event=worker-ready generation=1 worker=2")
    with Client(web.address, "hello") as client:
        client.hear()

        [generation] = web.status()["generations"]

        for name in ("accepted", "active", "finished", "errors", "lost", "wait_us"):
            assert generation[name] is None, name
        assert web.status()["forwarded"] == 2


OWN_LOOP = """
import select, socket
from socketprotector_client import Channel, Drained, ready
channel = Channel.from_environment()
ready()
while select.select([channel], [], []):
    try:
        taken = channel.take()
    except Drained:
        break
    if taken:
        with socket.socket(fileno=taken[0]) as client:
            client.recv(100)
            client.sendall(b"taken\\n")
"""


@pytest.mark.costly
def test_a_worker_that_takes_from_the_channel_itself_is_not_said_to_have_taken_nothing(
    operated: Operating,
) -> None:
    web = operated(command=(sys.executable, "-c", OWN_LOOP))

    assert ask(web.address) == "taken"

    [each] = web.until_generation(1, accepted=None)["workers"]
    assert [each[name] for name in ("accepted", "active", "finished", "errors")] == [None] * 4


@pytest.mark.costly
def test_the_counts_of_several_workers_add_up(operated: Operating) -> None:
    web = operated("--workers", "3", command=(*OBEYS, "8"))
    clients = [Client(web.address, "hello") for _ in range(12)]
    for each in clients:
        each.hear()

    found = web.until_generation(1, accepted=12, active=12)
    assert sum(each["active"] for each in found["workers"]) == 12
    for each in clients:
        each.close()
    assert web.until_generation(1, active=0)["finished"] == 12


@pytest.mark.costly
def test_of_workers_without_the_library_nothing_is_known(operated: Operating) -> None:
    web = operated()
    ask(web.address)

    [generation] = web.status()["generations"]

    for found in (generation, *generation["workers"]):
        assert {found[name] for name in ("accepted", "active", "finished", "errors")} == {None}
    assert (generation["wait_us"], generation["lost"]) == (None, None)


@pytest.mark.costly
def test_where_a_forked_child_takes_as_well_the_counts_are_unknown(operated: Operating) -> None:
    web = operated(command=(*OBEYS, "--fork"))
    seen: set[int] = set()
    clients = []
    while len(seen) < 2:  # each serves one at a time, so the other takes the next
        clients.append(Client(web.address, "hello"))
        seen.add(pid_in(clients[-1].hear()))

    found = web.until_generation(1, accepted=None)
    assert (found["active"], found["wait_us"], found["lost"]) == (None, None, None)
    for each in clients:
        each.close()


def test_a_killed_worker_s_connections_are_lost_and_it_is_a_crash(
    operated: Operating, tmp_path: Path
) -> None:
    web = operated("--log-file", tmp_path / "log", command=(*OBEYS, "8"))
    line = web.line(follows=True)
    for _ in range(4):
        ask(web.address)
    clients = [Client(web.address, "hello") for _ in range(3)]
    for each in clients:
        each.hear()
    with Client(web.address, "fail") as failing:  # so that it has last words
        failing.hear()
    before = web.until_generation(1, active=3)
    [pid] = web.pids(1)

    os.kill(pid, signal.SIGKILL)
    for each in clients:
        assert each.hear() == ""
        each.close()

    assert line.event("exited")["lost"] == 3
    ask(web.address)  # its replacement serves
    found = web.until_generation(1, accepted=9, active=0)
    assert (found["lost"], found["finished"], found["errors"]) == (3, 9, 1)
    assert found["wait_us"]["count"] == 9
    assert web.pids(1) != [pid]
    [crash] = line.ask("crashes")["crashes"]
    assert before["workers"][0]["started_at"] < crash["at"] <= web.status()["now"]
    assert (crash["generation"], crash["slot"], crash["pid"]) == (1, 0, pid)
    assert (crash["how"], crash["when"], crash["lost"]) == ("was killed by SIGKILL", "serving", 3)
    assert "RuntimeError: as I was told" in crash["last_words"]
    assert crash["cpu_s"] > 0
    assert crash["max_rss_kib"] is None or crash["max_rss_kib"] > 10_000
    assert web.status()["crashes"] == 1


def test_the_status_says_why_a_worker_cannot_be_started_again(
    operated: Operating, release: Release
) -> None:
    web = operated(command=(str(release.path),))
    [pid] = web.pids(1)
    release.path.unlink()

    os.kill(pid, signal.SIGKILL)

    why = f"a quick death: cannot start: {release.path}: No such file or directory"
    eventually(
        lambda: (
            [each["reason"] for each in web.status().get("waits_for", ())]
            == [f"1 worker of generation 1: restart delayed after {why}"]
        ),
        "why",
    )


@pytest.mark.costly
def test_a_worker_that_ends_as_it_should_is_no_crash(operated: Operating) -> None:
    web = operated(command=(*OBEYS, "2"))
    line = web.line(follows=True)
    ask(web.address)

    line.ask("reload")
    line.event("drained", generation=1)
    line.ask("scale", by=1)
    line.event("worker-ready", generation=2)
    line.ask("scale", by=-1)
    line.event("exited", generation=2)

    assert line.status()["crashes"] == 0
    assert line.ask("crashes")["crashes"] == []


def test_where_connections_are_is_shown(operated: Operating) -> None:
    web = operated(command=(*OBEYS, "8"))
    began = web.status()["now"]
    line = web.line()
    with Client(web.address, "hello") as client:
        client.hear()
        web.until_generation(1, active=1)

        [found] = line.ask("connections")["workers"]
        times = found.pop("accepted_at_by_fd")
        assert (found["generation"], found["pid"]) == (1, web.pids(1)[0])
        assert found["since_at"] <= began
        sockets = {
            fd
            for fd in times
            if os.path.exists(f"/proc/{found['pid']}/fd/{fd}")
            and os.readlink(f"/proc/{found['pid']}/fd/{fd}").startswith("socket:")
        }
        assert len(sockets) == 1
        assert began - 1 <= times[sockets.pop()] <= web.status()["now"]
        asked = line.ask("connections", generation=1)
        assert asked["workers"][0]["pid"] == found["pid"]
        [address] = [each["address"] for each in web.status()["listeners"]]
        assert asked["addresses_by_generation"] == {"1": [address]}
    assert line.refused("connections", generation=9) == (
        "unknown",
        "there is no generation 9; `status` lists the generations",
    )


# -- doing -------------------------------------------------------------------------


def test_each_command_is_answered(operated: Operating) -> None:
    web = operated()
    arguments: dict[str, dict[str, Any]] = {
        "scale": {"by": 0},
        "lame-duck": {"on": False},
        "hold": {"seconds": 0.1},
        "replace": {"pid": 1},
        "kill": {"generation": 77},
        "log-level": {"level": "info"},
        "deploy": {"release": "1"},
    }
    line = web.line()
    for command in (*(each for each in COMMANDS if each not in ("stop", "upgrade")), "status"):
        line.send(command, **arguments.get(command, {}))
        found = line.answer()
        assert found["ok"] or found["code"] in ("refused", "unknown", "unmet"), found


@pytest.mark.costly
def test_a_hold_accepts_nothing_and_refuses_nothing_until_its_time_is_over(
    operated: Operating,
) -> None:
    web = operated()
    line = web.line(follows=True)
    with Load(f"127.0.0.1:{web.address[1]}", concurrency=16) as load:
        served(load)

        until = line.ask("hold", seconds=3)["until_at"]
        line.event("held")
        found = line.status()
        assert 0 < found["held_s"] <= 3
        assert until <= found["now"] + 3
        accepted = found["forwarded"]
        eventually(lambda: web.status()["listeners"][0]["backlog"] > 0, "a client that waits")
        held = line.status()
        assert held["forwarded"] == accepted or held["held_s"] is None
        line.event("released")
        assert line.status()["held_s"] is None

        served(load, 50)
    assert load.snapshot().failures == ()


def test_a_hold_is_released_by_hand_and_begins_again_when_asked(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)
    line.ask("hold", seconds=0.2)
    line.ask("hold", seconds=3000)
    line.event("held")
    with Client(web.address, "hello") as client:
        eventually(lambda: web.status()["listeners"][0]["backlog"] == 1, "it waits")
        assert 2900 < line.status()["held_s"] <= 3000
        assert line.status()["forwarded"] == 0

        assert line.ask("release") == {}

        line.event("released")
        assert client.hear() == f"[{spawned(web.daemon)[0]}] hello"
    assert line.ask("release") == {}  # once more changes nothing
    assert line.status()["held_s"] is None


def test_a_stop_while_held_serves_clients_that_have_connected(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)
    address = web.address
    line.ask("hold", seconds=3000)
    line.event("held")
    clients = [Client(address, "hello") for _ in range(5)]

    line.ask("stop")

    for each in clients:
        assert each.hear() == f"[{spawned(web.daemon)[0]}] hello"
        each.close()
    assert web.daemon.wait() == 0


@pytest.mark.costly
def test_a_reload_while_held_takes_place(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)
    line.ask("hold", seconds=3000)
    with Client(web.address, "hello") as client:
        line.ask("reload")
        line.event("reloaded", generation=2)
        assert line.status()["forwarded"] == 0

        line.ask("release")

        assert pid_in(client.hear()) == spawned(web.daemon, 2)[0]


@pytest.mark.costly
def test_more_workers_than_there_are_descriptors_for_are_refused(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)
    resource.prlimit(web.daemon.pid, resource.RLIMIT_NOFILE, (200, 200))

    for asked in ({"to": 3000}, {"by": 3000}):
        code, said = line.refused("scale", **asked)
        assert code == "refused"
        assert "descriptors each, and the hard limit of 200 has room for" in said
    assert line.status()["workers_wanted"] == 1
    assert line.ask("scale", to=2) == {"workers": 2}


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_stop_comes_before_hundreds_that_were_asked_for_are_started(operated: Operating) -> None:
    web = operated()
    both = ({"command": "scale", "to": 800}, {"command": "stop", "quick": True})

    # In one piece, so that nothing but the protector decides when it hears the second.
    web.line().socket.sendall(
        b"".join(json.dumps({"v": 1, **each}).encode() + b"\n" for each in both)
    )

    web.daemon.log.wait_for("event=stopped")
    assert web.daemon.log.text().count("event=spawned") < 400


@EITHER_HANDOFF
@pytest.mark.costly
def test_workers_are_scaled_to_and_by(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)

    assert line.ask("scale", to=3) == {"workers": 3}
    assert line.ask("scale", by=-1) == {"workers": 2}
    assert line.ask("scale", by=0) == {"workers": 2}
    assert line.refused("scale", by=-2) == (
        "refused",
        "cannot go below 1 worker; to end the service use `stop`",
    )

    eventually(lambda: len(web.pids(1)) == 2, "two workers")
    assert line.status()["workers_wanted"] == 2
    line.ask("reload")
    line.event("reloaded", generation=2)
    assert len(web.pids(2)) == 2


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_generation_is_replaced_by_one_of_the_same_program(
    operated: Operating, tmp_path: Path
) -> None:
    for name, command in (("one", MANY), ("two", ("/bin/false",))):
        (tmp_path / name).mkdir()
        Release(tmp_path / name / "daemon").becomes(*command)
    current = tmp_path / "current"
    current.symlink_to("one")
    web = operated(command=(str(current / "daemon"),))
    line = web.line(follows=True)
    current.unlink()
    current.symlink_to("two")  # a deploy that was not reloaded
    with Load(f"127.0.0.1:{web.address[1]}", concurrency=8) as load:
        served(load)

        assert line.ask("replace", generation=1) == {"generation": 1}
        line.event("drained", generation=1)
        served(load, 50)
    assert load.snapshot().failures == ()
    assert line.status()["route"] == 2
    assert line.refused("replace", generation=1)[0] == "unknown"


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_worker_is_replaced_by_its_pid_when_its_replacement_serves(operated: Operating) -> None:
    web = operated("--workers", "2", command=(*OBEYS, "4"))
    line = web.line(follows=True)
    old = web.pids(1)
    with Load(f"127.0.0.1:{web.address[1]}", concurrency=8) as load:
        served(load)

        number = line.ask("replace", pid=old[0])["worker"]
        assert number == 1
        new = line.event("worker-ready", generation=1)["worker"]
        line.event("retired", worker=number)
        assert line.event("exited", worker=number)["how"] == "exited with status 0"
        served(load, 50)
    assert load.snapshot().failures == ()
    assert new == 3
    found = web.pids(1)
    assert len(found) == 2
    assert old[0] not in found
    assert old[1] in found
    assert line.refused("replace", pid=old[0]) == (
        "unknown",
        f"process {old[0]} is not a worker of {web.status()['name']}; `status` lists the workers",
    )
    assert line.refused("replace", pid=web.daemon.pid)[0] == "unknown"
    assert line.status()["crashes"] == 0


@pytest.mark.costly
def test_what_drains_already_or_is_not_there_is_not_replaced(
    operated: Operating, release: Release, gate: Gate
) -> None:
    web = operated(command=(str(release.path),))
    line = web.line(follows=True)
    with Client(web.address, "hello") as client:
        client.hear()
        [old] = web.pids(1)
        line.ask("reload")
        line.event("reloaded", generation=2)

        code, text = line.refused("replace", generation=1)
        assert (code, text) == ("refused", "generation 1 is draining already; `kill` ends it")
        assert line.refused("replace", pid=old)[0] == "refused"
        missing = ("unknown", "there is no generation 7; `status` lists the generations")
        assert line.refused("replace", generation=7) == missing
        release.becomes(*gate.before(*MANY))
        line.ask("reload")
        assert line.refused("replace", generation=2) == (
            "refused",
            "a start, reload, dry run or replacement is in progress; try again later",
        )
        gate.open()
        line.event("reloaded", generation=3)


@pytest.mark.costly
def test_a_refused_kill_of_a_starting_generation_names_the_rollback(
    operated: Operating, release: Release, gate: Gate
) -> None:
    web = operated(command=(str(release.path),))
    line = web.line(follows=True)
    release.becomes(*gate.before(*MANY))
    line.ask("reload")
    line.event("spawned", generation=2)

    assert line.refused("kill", generation=2) == (
        "refused",
        "generation 2 is starting; `rollback` first",
    )
    assert line.ask("rollback") == {"generation": 2}
    line.event("reload-failed", generation=2)
    line.event("drained", generation=2)


@EITHER_HANDOFF
def test_what_is_left_of_a_draining_generation_is_killed(operated: Operating) -> None:
    web = operated()
    line = web.line(follows=True)
    with Client(web.address, "hello") as client:
        client.hear()
        assert line.refused("kill", generation=1) == (
            "refused",
            "generation 1 is serving; `replace` it first",
        )
        assert line.refused("kill", generation=5) == (
            "unknown",
            "there is no generation 5; `status` lists the generations",
        )
        line.ask("reload")
        line.event("reloaded", generation=2)

        assert line.ask("kill", generation=1) == {"workers": 1}

        line.event("drained", generation=1)
        assert client.hear() == ""
    assert line.status()["crashes"] == 0  # it was asked for


def test_the_log_says_more_and_less_as_it_is_told(operated: Operating, tmp_path: Path) -> None:
    log = tmp_path / "log"  # what is answered after a line finds the line there
    web = operated("--log-file", log)
    line = web.line(follows=True)

    assert line.ask("log-level", level="debug") == {"level": "debug"}
    mark = len(log.read_text())
    line.ask("reload")
    line.event("drained", generation=1)
    assert line.status()["log_level"] == "debug"
    more = log.read_text()[mark:]
    assert "debug event=decided" in more
    assert "event=drained generation=1" in more
    line.ask("log-level", level="error")
    mark = len(log.read_text())
    line.ask("reload")
    line.event("reloaded", generation=3)  # events do not depend on it
    line.event("drained", generation=2)
    assert line.status()["log_level"] == "error"
    assert not [each for each in log.read_text()[mark:].splitlines() if " error " not in each]


def test_logs_are_reopened(operated: Operating, tmp_path: Path) -> None:
    log = tmp_path / "log"
    web = operated("--log-file", log)
    log.rename(tmp_path / "log.1")

    assert web.line().ask("reopen") == {}

    eventually(lambda: log.exists() and "event=reopened" in log.read_text(), "a new log")


def test_a_log_that_cannot_be_reopened_is_refused(operated: Operating, tmp_path: Path) -> None:
    folder, moved = tmp_path / "logs", tmp_path / "moved"
    folder.mkdir()
    web = operated("--log-file", folder / "log")
    folder.rename(moved)

    code, error = web.line().refused("reopen")

    assert code == "refused"
    assert re.fullmatch("not reopened: .*No such file.*; lines still go to the old file", error)
    text = (moved / "log").read_text()
    assert "event=reopen-failed" in text
    assert "event=reopened" not in text
    [warning] = web.status()["warnings"]
    assert warning.startswith(f"{folder / 'log'} was renamed or removed: lines go to the old file")

    folder.mkdir()
    assert web.line().ask("reopen") == {}
    assert web.status()["warnings"] == []


def test_a_quick_stop_waits_for_no_client(operated: Operating) -> None:
    web = operated(command=(*OBEYS, "1"))
    with Client(web.address, "hello") as client:
        client.hear()

        assert web.line().ask("stop", quick=True) == {}

        assert client.hear() == ""
    assert web.daemon.wait() == 0


# -- reloads -----------------------------------------------------------------------


def test_the_verdict_of_a_reload_is_an_event_and_is_remembered(
    operated: Operating, release: Release, tmp_path: Path
) -> None:
    web = operated("--log-file", tmp_path / "log", command=(str(release.path),))
    line = web.line(follows=True)
    release.write("#!/bin/sh\nprintf 'such:\\n\\tno \\033[2J table\\n' >&2\nexit 3\n")

    assert line.ask("reload") == {"generation": 2}

    failed = line.event("reload-failed", "reloaded")
    assert (failed["event"], failed["generation"]) == ("reload-failed", 2)
    assert "exited with status 3 before it was ready" in failed["reason"]
    assert failed["last_words"] == "such:\n        no \\x1b[2J table"
    last = line.status()["reloads"][-1]
    assert (last["generation"], last["result"]) == (2, "failed")
    assert last["reason"].startswith(failed["reason"])
    [crash] = line.ask("crashes")["crashes"]
    assert (crash["when"], crash["how"]) == ("starting", "exited with status 3")
    assert crash["last_words"] == failed["last_words"]
    # A shell that exits at once is smaller than the protector, whose memory Linux counts as its.
    assert crash["max_rss_kib"] is None

    release.becomes(*MANY)
    assert line.ask("reload") == {"generation": 3}
    assert line.event("reload-failed", "reloaded")["event"] == "reloaded"
    assert [each["result"] for each in line.status()["reloads"]] == ["failed", "reloaded"]


def test_a_reload_asked_for_during_another_is_the_one_after(
    operated: Operating, release: Release, gate: Gate
) -> None:
    web = operated(command=(str(release.path),))
    line = web.line(follows=True)
    release.becomes(*gate.before(*MANY))

    assert line.ask("reload") == {"generation": 2}
    assert line.ask("reload") == {"generation": 3}
    assert line.ask("reload") == {"generation": 3}
    assert line.status()["reload_wanted"] is True
    gate.open()
    assert line.event("reloaded")["generation"] == 2
    gate.open()
    assert line.event("reloaded")["generation"] == 3
    assert line.status()["reload_wanted"] is False


# -- the socket file ------------------------------------------------------------------


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_for_its_user_alone_and_gone_at_the_end(operated: Operating, place: Path) -> None:
    web = operated()
    follower, half = web.line(follows=True), web.line()
    half.socket.sendall(b'{"v":')
    assert mode_of(place) == 0o600

    web.daemon.stop()

    assert not place.exists()
    follower.event("stopped")
    assert follower.hear() == half.hear() == {}


@pytest.mark.costly
def test_two_of_a_name_are_told_apart_by_the_port_and_that_is_said(protector: Starter) -> None:
    name = os.path.basename(MANY[0])
    first = protector("127.0.0.1:0", "--", *MANY).ready()
    second = protector("127.0.0.1:0", "--", *MANY).ready()

    said = second.log.wait_for("event=notice")
    assert f"another protector is already named {name}. " in said
    assert f"Use --name {name}:{second.port} for this one, --name {name}:PORT for the other" in said
    assert first.log.count("event=notice") == 0
    for daemon, key in ((first, name), (second, f"{name}:{second.port}")):
        with Line(default_path(key)) as line:
            assert (line.status()["pid"], line.status()["name"]) == (daemon.pid, name)
        daemon.stop()
        assert not default_path(key).exists()


def test_a_name_that_is_too_long_for_a_socket_is_reported(protector: Starter) -> None:
    daemon = protector("--name", "n" * 120, "127.0.0.1:0", "--", *MANY).ready()

    assert "no control socket: " in (said := daemon.log.wait_for("event=notice"))
    assert ": AF_UNIX path too long; " in said
    daemon.stop()


@pytest.mark.costly
def test_a_program_whose_name_is_long_lends_the_first_of_it(
    protector: Starter, tmp_path: Path
) -> None:
    program = tmp_path / ("x" * 120)
    program.write_text("#!/bin/sh\nexec " + shlex.join(MANY) + "\n")
    program.chmod(0o755)

    daemon = protector("127.0.0.1:0", "--", str(program)).ready()

    with Line(default_path("x" * 48)) as line:
        assert line.status()["name"] == "x" * 48
    assert daemon.log.count("event=notice") == 0
    daemon.stop()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path fits into the name of a socket."""
    with tempfile.TemporaryDirectory(prefix="sp-") as made:
        yield Path(made)


@pytest.mark.costly
def test_each_of_a_name_can_be_operated_though_their_files_are_called_alike(
    protector: Starter, short: Path
) -> None:
    for folder in "abc":
        (short / folder).mkdir()
    paths = [short / folder / "s" for folder in "abc"]

    daemons = [
        protector("--name", "web", f"unix:{path}?mode=0600", "--", *MANY).ready() for path in paths
    ]

    keys = ["web", "web:s", f"web:{paths[2]}".replace("/", "_")]
    daemons[2].log.wait_for(f"event=notice .*--name web:{paths[2]} for this one")
    for daemon, key in zip(daemons, keys, strict=True):
        with Line(default_path(key)) as line:
            assert line.status()["pid"] == daemon.pid
        daemon.stop()


@pytest.mark.parametrize(
    ("options", "key"), [(("--name", "web"), "web"), ((), os.path.basename(MANY[0]))]
)
def test_where_no_path_was_given_it_is_named_after_the_name_or_the_program(
    protector: Starter, options: tuple[str, ...], key: str
) -> None:
    daemon = protector(*options, "127.0.0.1:0", "--", *MANY).ready()

    path = default_path(key)

    with Line(path) as line:
        assert line.status()["pid"] == daemon.pid
        assert line.status()["control"] == str(path)
    assert mode_of(path) == 0o600
    assert mode_of(path.parent) == 0o755
    daemon.stop()
    assert not path.exists()


@AS_ANOTHER_USER
@pytest.mark.costly
def test_root_s_outlives_the_login_that_started_it(protector: Starter) -> None:
    """What is in the folder of a login is removed at its end, without asking."""
    name = f"sp-test-{os.getpid()}"
    login = f"/run/user/{name}"  # no other test's
    there = Path("/run/socketprotector", f"{name}.control")

    daemon = protector("--name", name, "127.0.0.1:0", "--", *MANY, XDG_RUNTIME_DIR=login).ready()

    with Line(there) as line:
        assert line.status()["control"] == str(there)
    assert not os.path.lexists(login)
    # Found with the variable and without.
    for runtime in (login, os.environ["XDG_RUNTIME_DIR"], ""):
        words = [sys.executable, "-m", "socketprotector.ctl", "list", "--json"]
        said = subprocess.run(
            words,
            env={**os.environ, "XDG_RUNTIME_DIR": runtime},
            stdout=subprocess.PIPE,
            check=True,
        )
        assert str(there) in [each["control"] for each in json.loads(said.stdout)["instances"]]
    daemon.stop()
    assert not there.exists()


@AS_ANOTHER_USER
def test_it_is_the_user_s_that_the_protector_becomes(operated: Operating, place: Path) -> None:
    sleeps = ("/bin/sh", "-c", "exec sleep 1000")  # which any user may execute
    web = operated("--user", "nobody", "--ready", "after:1ms", command=sleeps)

    assert (place.stat().st_uid, mode_of(place)) == (NOBODY, 0o600)
    assert web.status()["phase"] == "serving"  # root is heard, too


SLEEPS = (
    *("--handoff", "listener", "--drain-signal", "TERM", "--ready", "after:1ms"),
    *("127.0.0.1:0", "--", "/bin/sh", "-c", "exec sleep 1000"),
)


def listed_in(folder: Path) -> dict[str, str | None]:
    """The sockets that `list` shows, and why one has no status."""
    words = [sys.executable, "-m", "socketprotector.ctl", "list", "--json"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    with forked.popen(words, env=environment, stdout=subprocess.PIPE) as process:
        said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    found = {each["control"]: each["why"] for each in json.loads(said)["instances"]}
    return {path: why for path, why in found.items() if path.startswith(str(folder))}


@AS_ANOTHER_USER
def test_a_stopped_protector_that_could_not_remove_its_own_is_not_listed(
    protector: Starter,
) -> None:
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp") as made:
        folder = Path(made)
        folder.chmod(0o755)  # `nobody` must reach the socket
        path = folder / "socketprotector" / "web.control"
        words = ("--name", "web", "--user", "nobody", *SLEEPS)
        environment = {"XDG_RUNTIME_DIR": made}
        # A member of a later protector's group may not connect to the file that is left.
        member = Identity("bin", uid=2, gid=2, groups=(60,))

        for _ in range(2):  # the next start replaces the file
            daemon = protector(*words, XDG_RUNTIME_DIR=made).ready()

            assert listed_in(folder) == {str(path): None}
            assert mode_of(path) == 0o600
            daemon.stop()
            assert mode_of(path) == 0o200  # connect() still tells its user that nobody listens
            assert listed_in(folder) == {}
            found = as_user(member, lambda: " ".join(["read:", *sockets(environment, 2)]))
            assert "read:" in found
            assert str(folder) not in found


@AS_ANOTHER_USER
def test_with_a_group_it_is_that_group_s_too(operated: Operating, place: Path) -> None:
    operated("--control-group", "games")

    assert mode_of(place) == 0o660
    assert place.stat().st_gid == 60


@AS_ANOTHER_USER
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.costly
def test_members_of_the_status_group_see_a_reload_and_may_not_ask_for_one(
    operated: Operating, place: Path, both: bool
) -> None:
    control = ["--control-group", "games"] if both else []
    web = operated(*control, "--status-group", "nogroup")
    place.parent.chmod(0o755)

    def said_to(gid: int, *commands: str) -> list[dict[str, Any]]:
        lines = "".join(json.dumps({"v": 1, "command": each}) + "\n" for each in commands)
        done = subprocess.run(
            [sys.executable, "-c", SPEAKS_TO_CONTROL, str(place), str(gid), str(NOBODY)],
            input=lines,
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(each) for each in done.stdout.splitlines()]

    status, events, reload = said_to(65_534, "status", "events", "reload")
    assert status["result"]["phase"] == "serving"
    assert events["ok"]
    assert (reload["ok"], reload["code"]) == (False, "denied")
    assert web.status()["route"] == 1
    if both:
        assert said_to(60, "reopen")[0]["ok"]
        web.daemon.log.wait_for("event=reopened")
    assert mode_of(place) == 0o660
    with pytest.raises(subprocess.CalledProcessError) as refused:
        said_to(1, "status")  # another group
    assert "PermissionError" in refused.value.stderr


#: As a user and group: sends its input, and says a line for each.
SPEAKS_TO_CONTROL = """
import os, socket, sys
path, gid, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([gid])
os.setgid(1 if gid != 1 else 2)
os.setuid(uid)
with socket.socket(socket.AF_UNIX) as one, one.makefile("rb") as lines:
    one.connect(path)
    for line in sys.stdin:
        one.sendall(line.encode())
        print(lines.readline().decode(), end="")
"""


@pytest.mark.costly
def test_a_stale_one_is_replaced(operated: Operating, place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))

    assert operated().status()["phase"] == "serving"


@pytest.mark.costly
def test_a_living_one_is_not_taken_away_and_it_goes_on_without(
    operated: Operating, protector: Starter, place: Path
) -> None:
    first = operated()

    second = protector("--control", place, "127.0.0.1:0", "--", *MANY).ready()

    assert "no control socket" in second.log.wait_for("event=notice")
    assert ask(("127.0.0.1", second.port)) == f"[{spawned(second)[0]}] hello"
    second.stop()
    assert first.status()["pid"] == first.daemon.pid


@pytest.mark.costly
def test_it_does_without_where_one_cannot_be_made(protector: Starter, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x", tmp_path / "none" / "x", tmp_path / ("x" * 200)):
        daemon = protector("--control", place, "127.0.0.1:0", "--", *MANY).ready()
        assert "no control socket" in daemon.log.wait_for("event=notice")
        ask(("127.0.0.1", daemon.port))
        daemon.stop()
        assert daemon.log.count("event=notice") == 1


def test_without_one_there_is_none(protector: Starter) -> None:
    daemon = protector("--no-control", "--name", "web", "127.0.0.1:0", "--", *MANY).ready()

    assert not default_path("web").exists()
    assert daemon.log.count("event=notice") == 0


# -- upgrades and kills -----------------------------------------------------------------


def remembered(found: dict[str, Any]) -> dict[str, Any]:
    """What must not change when another program goes on."""
    names = ("started_at", "lost", "reloads", "crashes", "log_level", "workers_wanted")
    kept: dict[str, Any] = {name: found[name] for name in names}
    for generation in found["generations"]:
        kept[generation["number"]] = {
            name: value for name, value in generation.items() if name != "workers"
        }
        for each in generation["workers"]:
            each.pop("ready_at")  # worked out from another clock each time
            kept[each["number"]] = each
    return kept


@pytest.mark.parametrize("how", ["upgrade", "kill"])
@pytest.mark.costly
def test_all_that_is_known_outlives_the_program(operated: Operating, how: str) -> None:
    web = operated(*(["--guard"] if how == "kill" else []), command=(*OBEYS, "8"))
    address = web.address
    line = web.line(follows=True)
    line.ask("log-level", level="warning")
    clients = [Client(address, "hello") for _ in range(2)]
    for each in clients:
        each.hear()
    web.until_generation(1, active=2)
    os.kill(web.pids(1)[0], signal.SIGKILL)
    line.event("worker-ready", generation=1)
    for each in clients:
        each.close()
    ask(address)
    line.ask("scale", to=2)
    line.event("worker-ready", generation=1)
    line.ask("reload")
    line.event("drained", generation=1)
    kept = Client(address, "hello")
    kept.hear()
    web.until_generation(2, active=1)
    forwarded = web.status()["forwarded"]
    before, crashes = remembered(web.status()), line.ask("crashes")
    history = line.ask("history")
    assert [each["result"] for each in history["history"]] == ["reloaded"]
    assert before["lost"] == 0
    assert crashes["crashes"][0]["lost"] == 2

    for restarts in (1, 2):
        line = web.line(follows=True)
        if how == "upgrade":
            assert line.ask("upgrade") == {"from": __version__, "starts": restarts}
        else:
            os.kill(line.status()["pid"], signal.SIGKILL)
        while line.hear():
            pass  # any connected client is ended
        line = web.line()
        found = line.status()
        assert found["restarts"] == restarts
        assert remembered(found) == before
        # Not written down for each connection, so a kill may forget some.
        assert found["forwarded"] == forwarded or (how == "kill" and found["forwarded"] < forwarded)
        assert line.ask("crashes") == crashes
        assert line.ask("history") == history
        assert found["main_pid"] == web.daemon.pid
        assert kept.ask() == f"[{kept_by(web, kept)}] hello"
    assert mode_of(web.path) == 0o600
    kept.close()
    web.daemon.stop()
    assert not web.path.exists()


def kept_by(web: Operated, client: Client) -> int:
    """Who serves this connection."""
    pid = pid_in(client.ask("who"))
    assert pid in web.pids(2)
    return pid


def test_a_hold_outlives_the_program(operated: Operating) -> None:
    web = operated("--guard")
    address = web.address
    web.line().ask("hold", seconds=1000)
    with Client(address, "hello") as client:
        revived(web.daemon, kill_protector(web.daemon))
        assert 0 < web.line().status()["held_s"] < 1000
        assert "event=resumed" in upgrade(web.daemon)
        line = web.line()
        assert 0 < line.status()["held_s"] < 1000
        assert line.status()["forwarded"] == 0

        line.ask("release")

        assert client.hear() == f"[{spawned(web.daemon)[0]}] hello"


@pytest.mark.costly
def test_an_upgrade_that_fails_is_reported_and_no_process_is_ended(
    operated: Operating, installation: Any, place: Path
) -> None:
    installation.add("two")
    installation.script("two", "sys.exit('not today')\n")
    words = ("--control", place, "127.0.0.1:0", "--", *MANY)
    web = Operated(installation.start(*words).ready(), place)
    line = web.line(follows=True)
    installation.switch("two")

    line.ask("upgrade")

    assert "not today" in line.event("upgrade-failed")["reason"]
    assert line.status()["restarts"] == 0
    web.end()


@pytest.mark.costly
def test_term_with_many_clients_connected(operated: Operating) -> None:
    web = operated()
    lines = [web.line(follows=bool(number % 2)) for number in range(40)]
    for each in lines[::4]:
        each.socket.sendall(b'{"v":1,"command":"status"}\n' * 500)
    workers = spawned(web.daemon)

    web.daemon.stop()

    assert wait_gone(workers) == []
    assert not web.path.exists()
