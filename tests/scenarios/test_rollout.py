"""Canaries and rolling reloads of real processes, as an operator orders them."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from socketprotector.model.handoff_modes import ALIVE_S
from tests.running import WORKERS, Client, Protector, ask, eventually
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.config_file import File
from tests.scenarios.operating import OBEYS, Operated, Operating
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import Gate, Release, pid_in, spawned, worker
from tests.unit.ctl.conftest import run

#: Each worker has several clients at a time, and counts them.
WORKER = (*OBEYS, "8")
ROLLING = ("--reload-order", "rolling", "--drain-timeout", "1h", "--workers", "4")
HALF = ("--canary", "50%", "--for", "1h")

Beside = Callable[..., Running]


@pytest.fixture
def beside() -> Iterator[Beside]:
    """Start a reload beside the test: beside(operated, *options)."""
    started: list[Running] = []

    def start(one: Operated, *more: str) -> Running:
        started.append(Running("--control", str(one.path), "reload", *more))
        return started[-1]

    yield start
    for each in started:
        each.end()


def ctl(one: Operated, *words: str) -> str:
    """Return what a command prints, which succeeds."""
    ended = run("--control", str(one.path), *words)
    assert ended.status == 0, ended
    return ended.out


def shared(one: Operated, number: int = 2, old: int = 1) -> None:
    """Wait until a new generation has a share of the clients, and see that it is a half."""
    one.daemon.log.wait_for(f"event=route generation={old} sharing={number} share=50%")
    one.until_generation(number, phase="settling")
    assert split(one, number) == (5, 5)


def split(one: Operated, number: int) -> tuple[int, int]:
    """Return how many of ten clients come to the older generations, and to this one."""
    found = Counter(pid_in(ask(one.address)) for _ in range(10))
    to_new = sum(found[pid] for pid in one.pids(number))
    return 10 - to_new, to_new


def most_processes(one: Operated) -> int:
    """Return how many workers lived at a time at most, in the protector's own order of events."""
    living: set[str] = set()
    most = 0
    for line in list(one.daemon.log.seen):
        found = re.search(r"event=(spawned|exited) .*\bworker=(\d+)", line)
        if found and found[1] == "spawned":
            living.add(found[2])
        elif found:
            living.discard(found[2])
        most = max(most, len(living))
    return most


def quiet(one: Operated, number: int) -> None:
    """Wait until a generation has ended."""
    eventually(
        lambda: number not in [each["number"] for each in one.status()["generations"]],
        f"the end of generation {number}",
    )


# -- a canary ------------------------------------------------------------------------------


def test_a_canary_is_promoted_when_its_time_is_over(operated: Operating) -> None:
    one = operated(command=WORKER)

    said = run("--control", str(one.path), "reload", "--canary", "50%", "--for", "200ms")

    assert said.status == 0, said
    assert re.search(r"place of generation 1, the canary had \d+ connections at 50%\n", said.out)
    assert "switched: 50% of new connections go to generation 2" in said.err
    assert split(one, 2) == (0, 10)
    one.daemon.stop()


def test_promote_goes_on_stage_by_stage(operated: Operating, beside: Beside) -> None:
    one = operated("--settle", "1h", command=WORKER)
    reload = beside(one, *HALF)
    shared(one)
    assert one.status()["waits_for"][0]["kind"] == "canary"

    status = f"`socketprotectorctl --control {one.path} status`"
    said = ctl(one, "promote")
    assert said == f"promoted: generation 2 has left its stage; see {status}\n"
    one.until("route", 2)
    assert split(one, 2) == (0, 10)
    assert one.generation(2)["phase"] == "settling"
    ctl(one, "promote")

    assert reload.wait() == 0, reload.err.text()
    assert "the canary had 5 connections at 50%" in reload.out.text()
    refused = run("--control", str(one.path), "promote")
    assert (refused.status, refused.err) == (
        100,
        f"socketprotectorctl: nothing to promote: no generation is settling; see {status}\n",
    )
    one.daemon.stop()


@pytest.mark.costly
def test_promote_now_skips_the_settling(operated: Operating, beside: Beside) -> None:
    one = operated("--settle", "1h", command=WORKER)
    reload = beside(one, *HALF)
    shared(one)

    assert ctl(one, "promote", "--now") == "promoted: generation 2 is serving\n"

    assert reload.wait() == 0, reload.err.text()
    assert one.status()["phase"] == "serving"
    one.daemon.stop()


def test_a_rollback_gives_the_clients_back(operated: Operating, beside: Beside) -> None:
    one = operated(command=WORKER)
    reload = beside(one, *HALF)
    shared(one)
    with ExitStack() as clients:
        held = [clients.enter_context(Client(one.address)) for _ in range(2)]
        pids = {pid_in(each.ask()) for each in held}
        assert pids == {*one.pids(1), *one.pids(2)}

        assert ctl(one, "rollback") == "rolled back: generation 2 gets no new clients\n"

        assert reload.wait() == 3
        assert "generation 2 failed: rolled back: an operator called it off" in reload.err.text()
        assert {pid_in(ask(one.address)) for _ in range(10)} == {*one.pids(1)}
        assert {pid_in(each.ask()) for each in held} == pids
    quiet(one, 2)
    assert one.status()["lost"] == 0
    refused = run("--control", str(one.path), "rollback")
    assert refused.status == 2
    assert "nothing to roll back: no reload can be called off" in refused.err
    one.daemon.stop()


@pytest.mark.costly
def test_a_stop_calls_a_canary_off_and_both_generations_finish_their_clients(
    operated: Operating, beside: Beside
) -> None:
    one = operated(command=WORKER)
    reload = beside(one, *HALF)
    shared(one)
    with ExitStack() as clients:
        held = [clients.enter_context(Client(one.address)) for _ in range(2)]
        pids = [pid_in(each.ask()) for each in held]
        assert {*pids} == {*one.pids(1), *one.pids(2)}

        mark = one.daemon.signal(signal.SIGTERM)

        one.daemon.log.wait_for("event=reload-failed .*called off", after=mark)
        assert [pid_in(each.ask()) for each in held] == pids
    assert reload.wait() == 3
    assert "called off: the protector is stopping" in reload.err.text()
    assert one.daemon.wait() == 0
    lost = re.findall(r"event=exited .*\blost=(\d+)", one.daemon.log.text())
    assert [each for each in lost if each != "0"] == []


@pytest.mark.costly
def test_a_canary_with_too_few_clients_is_extended_and_then_fails(operated: Operating) -> None:
    one = operated(command=WORKER)
    words = ("reload", "--canary", "50%", "--for", "200ms", "--at-least", "5")

    said = run("--control", str(one.path), *words)

    assert said.status == 3
    assert "the canary had 0 of at least 5 connections in 400ms" in said.err
    assert split(one, 1) == (0, 10)
    one.daemon.stop()


@pytest.mark.costly
def test_a_canary_of_the_settings_is_read_again(operated: Operating, tmp_path: Path) -> None:
    file = File(tmp_path / "web.toml")
    file.command, file.listens = WORKER, ["127.0.0.1:0"]
    file.says('canary = "50%"\ncanary-for = "1h"')
    one = operated_by(operated, file)

    one.daemon.signal(signal.SIGHUP)
    shared(one)
    ctl(one, "promote")
    one.until("phase", "serving")
    file.says()
    changes = json.loads(ctl(one, "diff", "--json"))["changes"]
    one.daemon.signal(signal.SIGHUP)

    # The canary of the running settings would apply if the file could not be read.
    one.until("route", 3)
    assert changes == ["canary: 50% for 1h -> none"]
    assert split(one, 3) == (0, 10)
    file.says('canary = "50%"\nreload-order = "stop-first"')
    refused = run("--control", str(one.path), "reload")
    assert refused.status == 3
    assert "--canary does not work with --reload-order stop-first; leave one out" in refused.err
    one.daemon.stop()


def operated_by(operated: Operating, file: File) -> Operated:
    """Start a protector whose command and listener are in the file."""
    one = operated("--config", file.path, ready=False, command=())
    one.line()
    one.until("phase", "serving")
    return one


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--reload-order", "stop-first"), "does not work with --reload-order stop-first"),
        (ROLLING, "does not work with --reload-order rolling"),
    ],
)
@pytest.mark.costly
def test_a_canary_is_refused_under_another_reload_order(
    operated: Operating, words: tuple[str, ...], said: str
) -> None:
    one = operated(*words, command=WORKER)

    refused = run("--control", str(one.path), "reload", "--canary", "5%")

    assert refused.status == 100
    assert said in refused.err
    one.daemon.stop()


@pytest.mark.parametrize("handoff", ["listener"], indirect=True)
@pytest.mark.parametrize(
    ("listen", "said"),
    [("unix:{}/s", "unix:"), ("unix:@{}", "unix:@"), ("127.0.0.1:0?defer_accept=5", "defer_acc")],
)
def test_a_canary_is_refused_where_two_generations_share_a_socket(
    operated: Operating, tmp_path: Path, handoff: str, listen: str, said: str
) -> None:
    one = operated(listen.format(tmp_path), command=WORKER)

    refused = run("--control", str(one.path), "reload", "--canary", "5%")

    assert refused.status == 100, refused
    assert "no canary: " in refused.err
    assert said in refused.err
    one.daemon.stop()


# -- a rolling reload ----------------------------------------------------------------------


@pytest.mark.parametrize("surge", ["1", "2", "50%"])
def test_a_rolling_reload_stays_within_its_bound(operated: Operating, surge: str) -> None:
    one = operated(*ROLLING, "--surge", surge, command=WORKER)

    ctl(one, "reload")

    quiet(one, 1)
    assert len(one.pids(2)) == 4
    assert most_processes(one) == 4 + (1 if surge == "1" else 2)
    one.daemon.stop()


@pytest.mark.costly
def test_a_rolling_reload_waits_for_a_worker_with_a_client(
    operated: Operating, beside: Beside
) -> None:
    one = operated(*ROLLING, command=WORKER)
    with ExitStack() as clients:
        reload = awaiting(one, beside, clients)
        waits = one.status()["waits_for"][0]
        assert waits["kind"] == "rolling"
        assert re.match(
            r"\d of 4 workers replaced, waiting for worker \d \(1 connection, longest \d+m?s\)",
            waits["reason"],
        )
        assert reload.process.poll() is None
    assert reload.wait() == 0, reload.err.text()
    quiet(one, 1)
    assert most_processes(one) == 5
    one.daemon.stop()


@pytest.mark.parametrize("handoff", ["listener"], indirect=True)
@pytest.mark.parametrize("ready", ["notify", "accept"])
@pytest.mark.costly
def test_workers_without_the_client_library_are_not_rolled_where_they_accept(
    operated: Operating, protector: Callable[..., Protector], tmp_path: Path, ready: str
) -> None:
    """Such a worker may cut clients that it has accepted, if others stay when it leaves."""
    said = "--reload-order rolling needs workers on the client library"
    words = (*ROLLING, "--ready", ready)
    first = protector(*words, "127.0.0.1:0", "--", *worker("asyncio_accepts"))
    assert first.wait() == 3
    assert said in first.log.wait_for("event=start-failed")

    release = Release(tmp_path / "release")
    release.becomes(*WORKER)
    one = operated(*words, command=(str(release.path),))
    release.becomes(*worker("asyncio_accepts"))
    ended = run("--control", str(one.path), "reload")
    assert ended.status == 3, ended
    assert said in ended.err
    quiet(one, 2)
    assert split(one, 1) == (0, 10)
    assert most_processes(one) <= 5
    one.daemon.stop()


@pytest.mark.parametrize("handoff", ["listener"], indirect=True)
@pytest.mark.costly
def test_an_answer_counts_once_the_slowest_worker_has_declared_that_it_can_finish_alone(
    operated: Operating, tmp_path: Path, gate: Gate, handoff: str
) -> None:
    """A faster worker has answered the probe of the generation before."""
    release, starts = Release(tmp_path / "release"), tmp_path / "starts"
    words = " ".join([sys.executable, str(WORKERS / "obeys.py"), "8"])
    release.write(
        f"#!/bin/sh\necho >>{starts}\n[ $(wc -l <{starts}) -eq 4 ] && cat {gate.path}\n"
        f"exec {words}\n"
    )
    words_of = (*ROLLING, "--ready", "accept")
    one = operated(*words_of, command=(str(release.path),), ready=False)
    one.line()
    for _ in range(3):
        one.daemon.log.wait_for("event=worker-ready")
    assert one.status()["phase"] == "starting"

    gate.open()

    one.until("phase", "serving")
    ctl(one, "reload")
    quiet(one, 1)
    one.daemon.stop()


@pytest.mark.parametrize("ready", [(), ("--ready", "accept")], ids=["default", "accept"])
@pytest.mark.costly
def test_a_later_worker_may_be_slow_to_declare_that_it_can_finish_alone(
    operated: Operating, beside: Beside, tmp_path: Path, gate: Gate, ready: tuple[str, ...]
) -> None:
    """Without a probe, only its message makes it ready, however long this takes."""
    release = Release(tmp_path / "release")
    release.becomes(*WORKER)
    words = (*ROLLING, "--handoff", "listener", *ready)
    one = operated(*words, command=(str(release.path),))
    starts = tmp_path / "starts"
    slow = " ".join([sys.executable, str(WORKERS / "obeys.py"), "8"])
    release.write(
        f"#!/bin/sh\necho >>{starts}\n[ $(wc -l <{starts}) -gt 1 ] && cat {gate.path}\n"
        f"exec {slow}\n"
    )
    reload = beside(one)
    eventually(lambda: one.status().get("rollout", {}).get("replaced") == 1, "the first new worker")
    eventually(lambda: len(one.generation(2)["workers"]) == 2, "the second new worker")
    begun = time.monotonic()
    eventually(lambda: time.monotonic() > begun + 2 * ALIVE_S, "the time of the timer")

    gate.stay_open()

    assert reload.wait() == 0, reload.err.text()
    quiet(one, 1)
    one.daemon.stop()


def occupy(one: Operated, clients: ExitStack, workers: int = 4) -> None:
    """Connect until each of the workers has a client that stays."""
    occupied: set[int] = set()
    while len(occupied) < workers:
        occupied.add(pid_in(clients.enter_context(Client(one.address)).ask()))


def awaiting(one: Operated, beside: Beside, clients: ExitStack) -> Running:
    """Let a rolling reload wait for old workers that each have a client; return the reload."""
    occupy(one, clients)
    reload = beside(one)
    eventually(
        lambda: any(w["state"] == "retiring" for w in one.generation(1)["workers"]),
        "an old worker that finishes",
    )
    one.until_generation(2, phase="settling")
    return reload


@pytest.mark.costly
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_failure_in_any_batch_brings_all_old_workers_back(
    operated: Operating, tmp_path: Path, batch: int
) -> None:
    """Start number 4 + batch fails, and no other."""
    release, starts = Release(tmp_path / "release"), tmp_path / "starts"
    words = " ".join([sys.executable, str(WORKERS / "obeys.py"), "8"])
    release.write(
        f"#!/bin/sh\necho >>{starts}\n[ $(wc -l <{starts}) -eq {4 + batch} ] && exit 3\n"
        f"exec {words}\n"
    )
    one = operated(*ROLLING, command=(str(release.path),))

    said = run("--control", str(one.path), "reload")

    assert said.status == 3, said
    assert "exited with status 3 before it was ready" in said.err
    quiet(one, 2)
    eventually(
        lambda: [w["state"] for w in one.generation(1)["workers"]] == ["ready"] * 4,
        "four workers of the old generation",
    )
    assert most_processes(one) <= 5
    assert pid_in(ask(one.address)) in one.pids(1)
    one.daemon.stop()


@pytest.mark.parametrize("leaving", [True, False])
@pytest.mark.costly
def test_an_old_worker_that_dies_during_a_rolling_reload_does_not_exceed_the_bound(
    operated: Operating, beside: Beside, leaving: bool
) -> None:
    one = operated(*ROLLING, command=WORKER)
    with ExitStack() as clients:
        reload = awaiting(one, beside, clients)
        state = "retiring" if leaving else "ready"
        pid = next(w["pid"] for w in one.generation(1)["workers"] if w["state"] == state)
        mark = len(one.daemon.log.seen)
        os.kill(pid, signal.SIGKILL)
        one.daemon.log.wait_for("event=exited generation=1 .*SIGKILL", after=mark)
    assert reload.wait() == 0, reload.err.text()
    quiet(one, 1)
    again = one.daemon.log.count("event=spawned generation=1 ") - 4
    assert again == 0 if leaving else again <= 1
    assert most_processes(one) == 5
    one.daemon.stop()


@pytest.mark.parametrize("wanted", [2, 6])
@pytest.mark.costly
def test_scale_during_a_rolling_reload_changes_its_target(
    operated: Operating, beside: Beside, wanted: int
) -> None:
    one = operated(*ROLLING, command=WORKER)
    with ExitStack() as clients:
        reload = awaiting(one, beside, clients)
        ctl(one, "scale", str(wanted))
    assert reload.wait() == 0, reload.err.text()
    quiet(one, 1)
    eventually(
        lambda: [w["state"] for w in one.generation(2)["workers"]] == ["ready"] * wanted,
        f"{wanted} new workers",
    )
    assert most_processes(one) <= max(4, wanted) + 1
    one.daemon.stop()


def test_the_last_worker_is_replaced_while_others_finish(operated: Operating) -> None:
    """There is no room, but new clients would wait for as long as the old ones stay."""
    one = operated(*ROLLING, command=WORKER)
    with ExitStack() as clients:
        occupy(one, clients)
        ctl(one, "scale", "1")
        eventually(
            lambda: len([w for w in one.generation(1)["workers"] if w["state"] == "ready"]) == 1,
            "three workers that finish",
        )
        [last] = [w for w in one.generation(1)["workers"] if w["state"] == "ready"]
        os.kill(last["pid"], signal.SIGKILL)
        one.daemon.log.wait_for("event=exited generation=1 .*SIGKILL")
        assert pid_in(ask(one.address)) == spawned(one.daemon)[-1]
        assert len(spawned(one.daemon)) == 5
    one.daemon.stop()


def test_a_generation_is_not_replaced_while_workers_of_an_earlier_reload_finish(
    operated: Operating,
) -> None:
    words = ("--reload-order", "rolling", "--drain-timeout", "1h", "--workers", "1")
    one = operated(*words, command=WORKER)
    with Client(one.address) as old:
        old.ask()
        ctl(one, "reload")
        refused = run("--control", str(one.path), "replace", "generation:2")
        assert refused.status == 100, refused
        assert "--workers plus --surge processes exist already; try again when" in refused.err
    quiet(one, 1)
    ctl(one, "replace", "generation:2")
    one.until_generation(3, phase="serving")
    one.daemon.stop()


# -- the protector is replaced meanwhile -------------------------------------------------------


def replaced(one: Operated, how: str) -> None:
    """Let another program continue: by USR2, or because the protector was killed."""
    if how == "upgrade":
        assert "event=resumed" in upgrade(one.daemon)
    else:
        revived(one.daemon, kill_protector(one.daemon))


@pytest.mark.parametrize("how", ["upgrade", "kill"])
@pytest.mark.costly
def test_a_canary_goes_on_in_the_next_program(
    operated: Operating, beside: Beside, how: str
) -> None:
    one = operated("--guard", command=WORKER)
    reload = beside(one, *HALF)
    shared(one)

    replaced(one, how)

    one.until_generation(2, phase="settling")
    assert split(one, 2) == (5, 5)
    ctl(one, "promote", "--now")
    assert reload.wait() == 0, reload.err.text()
    assert split(one, 2) == (0, 10)
    one.daemon.stop()


@pytest.mark.parametrize("how", ["upgrade", "kill"])
@pytest.mark.costly
def test_a_rolling_reload_goes_on_in_the_next_program(
    operated: Operating, beside: Beside, how: str
) -> None:
    one = operated("--guard", *ROLLING, command=WORKER)
    with ExitStack() as clients:
        reload = awaiting(one, beside, clients)
        replaced(one, how)
        assert one.status()["waits_for"][0]["kind"] == "rolling"
    assert reload.wait() == 0, reload.err.text()
    quiet(one, 1)
    assert len(one.pids(2)) == 4
    assert most_processes(one) == 5
    one.daemon.stop()


@pytest.mark.parametrize(
    ("handoff", "keys", "listens", "said"),
    [
        ("connection", 'reload-order = "stop-first"', "", "with --reload-order stop-first"),
        ("connection", 'reload-order = "rolling"\ndrain-timeout = "9s"', "", "order rolling"),
        ("listener", "", "unix:{}/s", "unix:"),
        ("listener", "", "127.0.0.1:0?defer_accept=5", "defer_accept"),
    ],
    indirect=["handoff"],
)
@pytest.mark.costly
def test_a_requested_canary_is_refused_where_the_new_settings_have_no_place_for_it(
    protector: Callable[..., Protector],
    place: Path,
    tmp_path: Path,
    handoff: str,
    keys: str,
    listens: str,
    said: str,
) -> None:
    """Otherwise all clients would meet the new release at once."""
    file = File(tmp_path / "web.toml")
    file.command = WORKER
    file.says()
    one = Operated(protector("--control", place, "--config", file.path), place)
    one.line()
    one.until("phase", "serving")
    file.listens += [listens.format(tmp_path)] * bool(listens)
    file.says(keys)

    ended = run("--control", str(one.path), "reload", *HALF, "--timeout", "9s")

    assert ended.status == 3, ended
    assert "no canary: " in ended.err
    assert said in ended.err
    assert split(one, 1) == (0, 10)
    one.end()
    one.daemon.stop()


@pytest.mark.costly
def test_a_canary_has_the_reload_order_that_the_file_has_now(
    protector: Callable[..., Protector], place: Path, tmp_path: Path
) -> None:
    file = File(tmp_path / "web.toml")
    file.command = WORKER
    file.says('reload-order = "stop-first"')
    one = Operated(protector("--control", place, "--config", file.path), place)
    one.line()
    one.until("phase", "serving")
    file.says()

    ended = run("--control", str(one.path), "reload", "--canary", "50%", "--for", "0.1s", "--wait")

    assert ended.status == 0, ended
    one.end()
    one.daemon.stop()
