"""socketprotectorctl with the real protector: what it says is what has become of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.load import Load
from tests.own_folder import let_through
from tests.rounds import rounds
from tests.running import DEADLINE_S, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import (
    Chance,
    Installation,
    kill_protector,
    protector_pid,
    revived,
    upgrade,
)
from tests.scenarios.config_file import File
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    Gate,
    Release,
    library_worker,
    pid_in,
    spawned,
    worker,
)
from tests.unit.ctl.conftest import run

Start = Callable[..., Protector]
MANY = worker("many")


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the control sockets, for protectors and ctl alike."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "socketprotector"


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "daemon")
    made.becomes(*MANY)
    return made


@pytest.fixture
def web(control: Path, protector: Start, release: Release) -> Start:
    """Start an instance of that name: web(*options)."""

    def start(*options: str | Path) -> Protector:
        words = ("--name", "web", *options, "127.0.0.1:0", "--", release.path)
        if "--log-file" not in options:
            return protector(*words).ready()
        daemon = protector(*words)
        eventually(lambda: '"phase": "serving"' in run("status", "--json").out, "it serves")
        return daemon

    return start


@pytest.fixture
def beside() -> Iterator[Callable[..., Running]]:
    """Start a ctl beside the test."""
    started: list[Running] = []

    def start(*arguments: str) -> Running:
        started.append(Running(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.end()


Beside = Callable[..., Running]


def state(*instance: str) -> dict[str, Any]:
    said = run(*instance, "status", "--json")
    assert said.status == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def port() -> int:
    """Where the only instance listens, if its log is in a file."""
    return int(state()["listeners"][0]["address"].rpartition(":")[2])


# -- status, list, finding ------------------------------------------------------------


def test_status_is_true(web: Start) -> None:
    daemon = web("--workers", "2")
    ask(("127.0.0.1", daemon.port))

    told = state()

    assert told["name"] == "web"
    assert told["pid"] == daemon.pid
    assert told["phase"] == "serving"
    assert told["listeners"][0]["address"] == daemon.addresses[0]
    assert told["forwarded"] == 1
    assert told["route"] == 1
    [generation] = told["generations"]
    assert [each["pid"] for each in generation["workers"]] == spawned(daemon)
    shown = run("status").out
    assert shown.startswith(f"web: serving, pid {daemon.pid}, ")
    assert f" {spawned(daemon)[0]} " in shown


@pytest.mark.parametrize("guard", [(), ("--guard",)])
@pytest.mark.costly
def test_it_is_found_by_name_by_pid_file_and_alone(
    guard: tuple[str, ...], web: Start, tmp_path: Path
) -> None:
    daemon = web("--pid-file", tmp_path / "pid", *guard)

    pids = {
        state(*instance)["pid"]
        for instance in (
            (),
            ("--name", "web"),
            ("--pid-file", str(tmp_path / "pid")),
            ("--control", str(tmp_path / "run" / "socketprotector" / "web.control")),
        )
    }

    assert pids == {protector_pid(daemon)}
    if guard:
        kill_protector(daemon)
        revived(daemon, 0)
        assert state("--pid-file", str(tmp_path / "pid"))["restarts"] == 1


@pytest.mark.costly
def test_list_shows_two_and_one_that_was_killed(
    control: Path, protector: Start, release: Release
) -> None:
    daemons = {
        name: protector("--name", name, "127.0.0.1:0", "--", release.path).ready()
        for name in ("one", "two", "three")
    }
    daemons["three"].process.kill()
    daemons["three"].process.wait()

    listed = json.loads(run("list", "--json").out)["instances"]

    assert [(each["key"], each["why"]) for each in listed] == [
        ("one", None),
        ("three", "dead"),
        ("two", None),
    ]


# -- reload ------------------------------------------------------------------------------


BROKEN = "import sys; print('starting', file=sys.stderr); raise RuntimeError('no such table')"


@pytest.mark.parametrize("after", ["start", "upgrade", "kill"])
@pytest.mark.costly
def test_a_failed_reload_shows_the_end_of_the_traceback_where_stderr_is_a_pipe(
    web: Start, release: Release, after: str
) -> None:
    daemon = web("--guard")
    if after == "upgrade":
        upgrade(daemon)
    if after == "kill":
        revived(daemon, kill_protector(daemon))
    release.becomes(sys.executable, "-c", BROKEN)

    failed = run("reload", "--name", "web")

    assert failed.status == 3, failed
    assert "RuntimeError: no such table" in failed.err
    assert "raise RuntimeError" in failed.err or "File " in failed.err
    daemon.log.wait_for("^RuntimeError: no such table$")  # in the log, too
    daemon.stop()


def test_a_stdout_of_its_own_stays_one_and_stderr_is_kept(web: Start, release: Release) -> None:
    daemon = web()
    release.write("#!/bin/sh\necho to stdout\necho to stderr >&2\nexit 1\n")

    failed = run("reload", "--name", "web")

    assert "to stderr" in failed.err
    assert "to stdout" not in failed.err
    daemon.out.wait_for("^to stdout$")
    daemon.log.wait_for("^to stderr$")
    daemon.stop()


@pytest.mark.costly
def test_without_the_relay_a_failed_reload_says_where_to_look(web: Start, release: Release) -> None:
    daemon = web("--no-log-relay")
    release.write("#!/bin/sh\nexit 1\n")

    failed = run("reload", "--name", "web")

    assert "see stderr of SocketProtector -f" in failed.err
    daemon.stop()


@EITHER_HANDOFF
def test_reload_under_load_ends_when_the_new_generation_serves(web: Start) -> None:
    daemon = web("--workers", "2")
    with Load(f"127.0.0.1:{daemon.port}", concurrency=4) as load:
        said = run("reload")
        answered = pid_in(ask(("127.0.0.1", daemon.port)))
        seen = load.stop()

    assert said.status == 0, said.err
    assert said.out == "reloaded: generation 2 is serving in place of generation 1\n"
    assert "generation 2 is starting\n" in said.err
    assert "ready 2/2\n" in said.err
    assert "switched: new connections go to generation 2\n" in said.err
    assert answered in spawned(daemon, 2)
    assert seen.failures == ()


@pytest.mark.costly
def test_a_broken_release_is_status_3_with_reason_and_last_words(
    web: Start, release: Release, tmp_path: Path
) -> None:
    web("--log-file", tmp_path / "log")
    release.write("#!/bin/sh\nprintf 'cannot read \\033[31mapp.conf\\n' >&2\nexit 7\n")

    said = run("reload")

    assert said.status == 3
    assert said.out == ""
    assert "generation 2 failed: " in said.err
    assert "exited with status 7" in said.err
    assert "generation 1 is still serving" in said.err
    assert "cannot read \\x1b[31mapp.conf" in said.err
    assert "\x1b" not in said.err
    assert pid_in(ask(("127.0.0.1", port()))) > 0
    assert json.loads(run("reload", "--json").out)["result"] == "failed"


@EITHER_HANDOFF
def test_drained_waits_for_the_last_connection(beside: Beside, web: Start) -> None:
    daemon = web()
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        client.hear()

        short = run("reload", "--drained", "--timeout", "10s")
        running = beside("reload", "--drained")
        running.err.wait_for(r"drained 0/\d workers")

    assert short.status == 4
    assert "still waiting for generation 1 (1 worker: pid " in short.err
    assert running.wait() == 0
    assert running.out.text().endswith("all older generations have ended")
    assert [each["number"] for each in state()["generations"]] == [3]


@pytest.mark.costly
def test_drained_is_waited_for_through_a_cut(beside: Beside, web: Start) -> None:
    daemon = web("--guard")
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        client.hear()
        running = beside("reload", "--drained")
        running.err.wait_for("drained 0/1 workers")
        assert "resumed" in upgrade(daemon)
        revived(daemon, kill_protector(daemon))

        assert running.process.poll() is None, running.err.text()
    assert running.wait() == 0
    assert running.out.text().endswith("all older generations have ended")


@EITHER_HANDOFF
def test_settle_is_waited_for_and_a_death_in_it_is_no_success(
    beside: Beside, web: Start, release: Release
) -> None:
    web("--settle", "1h")
    running = beside("reload")
    running.err.wait_for("switched")
    settling = max(state()["generations"], key=lambda g: g["number"])
    assert settling["phase"] == "settling"

    for each in settling["workers"]:
        os.kill(each["pid"], signal.SIGKILL)

    assert running.wait() == 3
    assert "generation 1 is still serving" in running.err.text()


@pytest.mark.parametrize("how", ["upgrade", "SIGKILL under --guard"])
@pytest.mark.parametrize("works", [True, False])
@EITHER_HANDOFF
@pytest.mark.costly
def test_a_verdict_comes_through_a_cut_in_the_middle(
    beside: Beside, how: str, works: bool, web: Start, release: Release, gate: Gate
) -> None:
    daemon = web(*(("--guard",) if "guard" in how else ()))
    release.becomes(*gate.before(*(MANY if works else ("/bin/false",))))
    running = beside("reload")
    running.err.wait_for("generation 2 is starting")

    if how == "upgrade":
        assert "resumed" in upgrade(daemon)
    else:
        revived(daemon, kill_protector(daemon))
    running.err.wait_for("connecting again")
    gate.open()

    assert running.wait() == (0 if works else 3)
    if works:
        assert running.out.seen == ["reloaded: generation 2 is serving in place of generation 1"]
    else:
        assert "generation 1 is still serving" in running.err.text()


@pytest.mark.parametrize("settles", [True, False])
def test_a_stop_in_the_middle_has_the_verdict_of_what_serves_to_the_end(
    beside: Beside, web: Start, release: Release, gate: Gate, settles: bool
) -> None:
    daemon = web(*(("--settle", "1h") if settles else ()))
    release.becomes(*(MANY if settles else gate.before(*MANY)))
    running = beside("reload", "--json")
    daemon.log.wait_for(f"event={'route' if settles else 'spawned'} generation=2")

    daemon.stop()

    assert running.wait() == (0 if settles else 3)
    told = json.loads(running.out.text())
    why = "before --settle was over: the protector is stopping"
    assert (told["result"], told["reason"]) == (
        ("reloaded", why) if settles else ("failed", "called off: the protector is stopping")
    )
    said = [line for line in daemon.log.seen if re.search("event=(reloaded|reload-failed) ", line)]
    assert len(said) == 1


@pytest.mark.costly
def test_two_reloads_at_once_each_get_their_own_verdict(
    beside: Beside, web: Start, release: Release, gate: Gate
) -> None:
    web()
    release.becomes(*gate.before("/bin/false"))
    first = beside("reload")
    first.err.wait_for("generation 2 is starting")
    second = beside("reload")
    second.err.wait_for("an earlier reload is still in progress")
    release.becomes(*MANY)
    gate.open()

    assert first.wait() == 3
    assert second.wait() == 0


def verdict(daemon: Protector, generation: int) -> str:
    """Wait for the line of the log that says how a reload ended.

    A protector that is killed when it has written down that the generation serves, and has not
    said so yet, says it when it is back.
    """

    def found() -> str:
        told, begun, back = "", False, False
        for line in list(daemon.log.seen):
            begun = begun or f"event=spawned generation={generation} " in line
            back = back or (begun and "event=resumed" in line)
            if re.search(rf"event=(reloaded|reload-failed) generation={generation}\b", line):
                return line
            if back and re.search(rf"event=route generation={generation}\b", line):
                told = line
        return told

    eventually(lambda: bool(found()), "a verdict in the log")
    return found()


@pytest.mark.slow
@pytest.mark.costly
def test_whatever_happens_to_the_protector_the_verdict_is_what_the_log_says(
    beside: Beside, web: Start, release: Release
) -> None:
    chance = Chance()
    daemon = web("--guard")
    for _ in range(rounds(2, 100)):
        works = chance.random.random() < 0.5
        release.becomes(*(MANY if works else ("/bin/false",)))
        running = beside("reload", "--json", "--timeout", "60s")
        chance.moment(0.4)  # before it is asked, in the middle, or when it is over
        mark = len(daemon.log.seen)
        if chance.random.random() < 0.5:
            kill_protector(daemon)
            revived(daemon, mark)
        else:
            upgrade(daemon)

        status = running.wait()

        told = json.loads(running.out.text())
        number = told["generation"]
        said = verdict(daemon, number)
        failed = "event=reload-failed" in said
        assert (status, told["result"]) == ((3, "failed") if failed else (0, "reloaded"))
        # A working one fails only where the protector dies in the middle of opening it.
        assert failed == (not works) or "when the protector was killed" in said
        assert (state()["route"] == number) is not failed


@pytest.mark.costly
def test_no_wait_only_asks(web: Start) -> None:
    daemon = web()

    said = run("reload", "--no-wait")

    assert said.out.startswith("reload requested: generation 2 will start")
    daemon.log.wait_for("event=reloaded generation=2")


# -- scale, hold, drain, kill -----------------------------------------------------------


def test_scale(web: Start) -> None:
    web()

    assert run("scale", "+2").out == "3 workers wanted\n"
    eventually(
        lambda: [w["state"] for w in state()["generations"][0]["workers"]] == ["ready"] * 3,
        "3 workers",
    )
    assert run("scale", "-1").out == "2 workers wanted\n"
    assert run("scale", "1").out == "1 worker wanted\n"
    assert run("scale", "-5").status in (0, 100)


def test_hold_lasts_as_long_as_the_command_and_no_client_is_refused(
    beside: Beside, web: Start
) -> None:
    daemon = web()
    running = beside("hold")
    running.out.wait_for("on hold")

    with Client(("127.0.0.1", daemon.port), "hello") as client:
        assert state()["held_s"] > 0
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0
        assert pid_in(client.hear()) > 0
    assert state()["held_s"] is None


def test_a_hold_whose_command_was_killed_ends_by_itself(beside: Beside, web: Start) -> None:
    daemon = web()
    running = beside("hold")
    running.out.wait_for("on hold")
    running.process.kill()
    running.wait()

    assert pid_in(ask(("127.0.0.1", daemon.port))) > 0


@pytest.mark.costly
def test_a_hold_lasts_through_an_upgrade_and_a_crash(beside: Beside, web: Start) -> None:
    daemon = web("--guard")
    running = beside("hold")
    running.out.wait_for("on hold")

    assert "resumed" in upgrade(daemon)
    revived(daemon, kill_protector(daemon))
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        until_at = state()["held_s"] + state()["now"]
        eventually(lambda: state()["held_s"] + state()["now"] > until_at + 0.5, "held for longer")
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0
        assert pid_in(client.hear()) > 0


def test_hold_for_a_time(web: Start) -> None:
    daemon = web()

    assert run("hold", "--for", "1h").status == 0
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        assert 3500 < state()["held_s"] <= 3600
        assert run("release").out == "released\n"
        assert pid_in(client.hear()) > 0


@EITHER_HANDOFF
def test_replace_of_a_worker_and_of_a_generation(web: Start) -> None:
    daemon = web()
    [first] = spawned(daemon)

    assert run("replace", str(first)).status == 0
    assert not wait_gone([first])
    assert run("replace", "generation:1").status == 0
    eventually(lambda: state()["route"] == 2, "the other generation")
    assert pid_in(ask(("127.0.0.1", daemon.port))) in spawned(daemon, 2)


@EITHER_HANDOFF
@pytest.mark.costly
def test_kill_ends_a_generation_that_drains_and_no_other(web: Start) -> None:
    daemon = web()
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        client.hear()
        assert run("reload").status == 0

        assert run("kill", "2").status == 100
        assert run("kill", "1").out == "killed 1 worker of generation 1\n"
        assert not wait_gone(spawned(daemon, 1))
        assert client.socket.recv(1) == b""
    assert pid_in(ask(("127.0.0.1", daemon.port))) in spawned(daemon, 2)


# -- stop and upgrade ---------------------------------------------------------------------


@pytest.mark.parametrize("guard", [(), ("--guard",)])
def test_stop_returns_when_it_is_gone(guard: tuple[str, ...], web: Start, control: Path) -> None:
    daemon = web(*guard)
    pids = [*spawned(daemon), protector_pid(daemon)]

    said = run("stop")

    assert (said.status, said.out) == (0, "stopped: web\n")
    assert not wait_gone(pids, 0.5)
    assert daemon.wait() == 0
    assert run("status").status == 1


@pytest.mark.costly
def test_stop_is_waited_for_though_the_protector_is_killed_in_the_middle(
    beside: Beside, web: Start
) -> None:
    daemon = web("--guard")
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        client.hear()
        running = beside("stop")
        running.err.wait_for("^waiting: generation 1 ")
        revived(daemon, kill_protector(daemon))

        assert running.process.poll() is None, running.err.text()
    assert (running.wait(), running.out.seen) == (0, ["stopped: web"])
    assert daemon.wait() == 0


@EITHER_HANDOFF
@pytest.mark.costly
def test_stop_says_which_workers_are_not_done_yet(beside: Beside, web: Start) -> None:
    daemon = web()
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        client.hear()
        said = run("stop", "--timeout", "3s")

        assert said.status == 4
        assert "generation 1 (1 worker: pid " in said.err
        quick = beside("stop", "--quick")
        assert quick.wait() == 0
    assert daemon.wait() == 0


@pytest.mark.costly
def test_upgrade_that_works_and_one_that_stays_with_the_old(
    control: Path, installation: Installation
) -> None:
    daemon = installation.start("--name", "web", "127.0.0.1:0", "--", *MANY).ready()
    installation.add("two", version="9.8.7")
    installation.switch("two")

    said = run("upgrade")

    assert said.status == 0, said.err
    assert said.out.startswith(f"upgraded: pid {daemon.pid} runs 9.8.7 (")
    installation.add("three")
    installation.script("three", "sys.exit('no such \\x1bmodule')\n")
    installation.switch("three")

    said = run("upgrade")

    assert said.status == 3
    assert said.out == ""
    assert "not upgraded: 9.8.7 keeps running: " in said.err
    assert "no such " in said.err
    assert "\x1b" not in said.err
    assert pid_in(ask(("127.0.0.1", daemon.port))) > 0


# -- connections, crashes, events, log ------------------------------------------------------


@pytest.mark.costly
def test_connections_shows_which_clients_keep_a_generation_alive(
    control: Path, protector: Start
) -> None:
    daemon = protector("--name", "web", "127.0.0.1:0", "--", *library_worker("echo")).ready()
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        pid = pid_in(client.hear())
        assert run("reload").status == 0

        told = json.loads(run("connections", "1", "--json").out)

        assert told["unseen"] == []
        [found] = told["connections"]
        host, port = client.socket.getsockname()
        assert (found["peer"], found["pid"], found["generation"]) == (f"{host}:{port}", pid, 1)
        assert found["bound"] == "exact"
        assert 0 <= found["age_s"] < DEADLINE_S
        assert found["waiting_bytes"] == 0
        assert "generation 1 draining: 1 connection, oldest " in run("connections").out


@EITHER_HANDOFF
def test_connections_of_a_removed_listener_and_of_a_stop_are_shown(
    control: Path, protector: Start, tmp_path: Path
) -> None:
    file, path = File(tmp_path / "web.toml"), tmp_path / "s"
    file.listens += [f"unix:{path}"]
    file.says()
    daemon = protector("--name", "web", "--config", file.path).ready()

    def shown(*words: str) -> list[tuple[int, str]]:
        answer = json.loads(run("connections", *words, "--json").out)
        assert answer["unseen"] == []
        return sorted((each["generation"], each["local"]) for each in answer["connections"])

    address = ("127.0.0.1", daemon.port)
    tcp, unix = f"127.0.0.1:{daemon.port}", f"unix:{path}"
    with Client(address, "hello") as first, Client(str(path), "hello") as second:
        old = [pid_in(each.hear()) for each in (first, second)]
        file.listens.pop()
        file.says()
        daemon.reload()
        with Client(address, "hello") as third:
            assert pid_in(third.hear()) not in old
            assert shown() == [(1, tcp), (1, unix), (2, tcp)]
            assert shown("1") == [(1, tcp), (1, unix)]

            upgrade(daemon)
            assert run("stop", "--no-wait").status == 0
            eventually(lambda: not state()["listeners"], "a stop without listeners")

            assert shown() == [(1, tcp), (1, unix), (2, tcp)]
            assert "generation 1 draining: 2 connections, oldest " in run("connections").out
    assert daemon.wait() == 0


def test_crashes_shows_how_a_worker_failed(web: Start, tmp_path: Path) -> None:
    web("--log-file", tmp_path / "log")
    [pid] = [each["pid"] for each in state()["generations"][0]["workers"]]
    os.kill(pid, signal.SIGSEGV)
    eventually(lambda: state()["crashes"] == 1, "the crash")

    said = run("crashes")

    assert f"pid {pid}, was killed by SIGSEGV" in said.out
    assert pid_in(ask(("127.0.0.1", port()))) != pid


def test_events_shows_what_the_log_has(beside: Beside, web: Start) -> None:
    web()
    running = beside("events", "--json")
    # It follows as soon as it is asked; that it is cannot be seen but by an event.
    eventually(lambda: run("reload").status == 0 and bool(running.out.seen), "an event")
    heard = len(running.out.seen)
    assert run("reload").status == 0

    def names() -> set[str]:
        return {json.loads(line)["event"] for line in running.out.seen[heard:]}

    eventually(lambda: {"reloading", "route", "reloaded"} <= names(), "what a reload logs")
    running.process.send_signal(signal.SIGINT)
    assert running.wait() == 130


def test_diff_says_what_a_reload_would_change_and_when_it_would_fail(
    control: Path, protector: Start, tmp_path: Path
) -> None:
    file = tmp_path / "web.toml"
    written = f'name = "web"\nlisten = "127.0.0.1:0"\ncommand = {json.dumps(MANY)}\n'
    file.write_text(written + "workers = 1\n")
    protector("--config", file).ready()
    same = run("diff")
    file.write_text(written + "workers = 2\n")
    changed = run("diff")
    file.write_text(written + "guard = true\n")
    fixed = run("diff")
    file.write_text(written + "wrokers = 2\n")
    wrong = run("diff")

    assert (same.status, changed.status, fixed.status, wrong.status) == (0, 0, 3, 3)
    assert same.out.startswith("no configuration change")
    assert "guard: false -> true; needs a restart" in fixed.out
    assert "workers" in changed.out
    assert wrong.err.startswith("socketprotectorctl: a reload would fail: ")
    assert "wrokers" in wrong.err
    assert run("reload").status == 3


@pytest.mark.parametrize("kind", ["socket", "empty", "script", "no interpreter", "closed"])
@pytest.mark.costly
def test_diff_says_which_command_a_reload_could_not_execute(
    control: Path, protector: Start, tmp_path: Path, kind: str
) -> None:
    file, daemon = tmp_path / "web.toml", tmp_path / "daemon"
    written = 'name = "web"\nlisten = "127.0.0.1:0"\ncommand = '
    file.write_text(written + json.dumps(MANY))
    protector("--config", file).ready()
    file.write_text(written + json.dumps([str(daemon)]))
    content = {"script": "exec sleep 1000\n", "no interpreter": "#!/no/such/interpreter\n"}
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(daemon))
    else:
        daemon.write_text(content.get(kind, "#!/bin/sh\n" if kind == "closed" else ""))
    daemon.chmod(0o644 if kind == "closed" else 0o755)
    reason = {
        "empty": "it is empty",
        "script": "neither a program nor a script that begins with #!",
        "no interpreter": "the interpreter in its first line is missing",
    }.get(kind, "not executable")

    said, reloaded = run("diff"), run("reload")
    daemon.unlink()
    daemon.write_text("#!/bin/sh\nexec sleep 1000\n")
    daemon.chmod(0o755)
    fixed = run("diff")

    assert (said.status, reloaded.status, fixed.status) == (3, 3, 0)
    assert f"a reload would fail: {file} line 3: command: cannot run {daemon}: {reason}" in said.err
    assert len(said.lines) == 1


def test_diff_without_a_configuration_file_is_no_broken_one(web: Start) -> None:
    web()

    said = run("diff")

    assert said.status == 100
    assert "there is no configuration file" in said.err


def test_log_level(web: Start) -> None:
    daemon = web()

    assert run("log-level", "debug").status == 0
    assert state()["log_level"] == "debug"
    assert daemon.process.poll() is None


@pytest.mark.costly
def test_another_user_is_denied(web: Start, control: Path) -> None:
    if os.geteuid() != 0:
        needs.another_user()
    web()
    let_through(control)
    socket_file = control / "web.control"
    for mode in (0o600, 0o666):  # the kernel's no, and the protector's
        socket_file.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, str(socket_file)],
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 100, done.stderr
        assert done.stderr.count("\n") == 1


_AS_NOBODY = """
import os, sys
from socketprotector.ctl.__main__ import main
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main(["--control", sys.argv[1], "status"]))
"""
