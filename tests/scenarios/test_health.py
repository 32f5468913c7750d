"""--health: a generation is asked while it serves; the answer is said, and nothing is done."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.procfs import children_of
from tests.running import Protector, eventually, wait_gone
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.managers import Giver
from tests.scenarios.operating import Operated, Operating
from tests.scenarios.probed import Asked, get, probers
from tests.scenarios.tools import EITHER_HANDOFF, Gate

Starter = Callable[..., Protector]
HTTP, HTTPS = "http:/healthz", "https:/healthz"
GONE = 'GET /healthz: 500, "database gone"'
#: Asked in a row, so that no test waits.
OFTEN = ("--health-every", "100ms")


class Watched:
    """A protector whose generation is asked."""

    def __init__(self, one: Operated) -> None:
        self.one, self.daemon = one, one.daemon

    @property
    def says(self) -> dict[str, Any]:
        found: dict[str, Any] = self.one.status()["health"]
        return found

    def until(self, **fields: Any) -> dict[str, Any]:
        eventually(lambda: fields.items() <= self.says.items(), f"{fields}: {self.says}")
        return self.says


@pytest.fixture
def watched(operated: Operating, asked: Asked) -> Callable[..., Watched]:
    def start(kind: str, *words: str) -> Watched:
        return Watched(
            operated(
                *("--health", kind, *OFTEN, "--ready", "accept", *words),
                command=(str(asked.release.path),),
            )
        )

    return start


def check(asked: Asked) -> str:
    """A check that is content with what a client would be told."""
    script = (
        "import os,socket\n"
        "one=socket.create_connection(os.environ['SOCKETPROTECTOR_PROBE'].rsplit(':',1))\n"
        "one.sendall(b'GET /healthz HTTP/1.0\\r\\n\\r\\n')\n"
        "assert one.recv(99).split()[1]==b'200'"
    )
    return f'check:{sys.executable} -S -c "{script}" 2>/dev/null'


@EITHER_HANDOFF
def test_what_it_answers_is_said_and_nothing_is_done(
    watched: Callable[..., Watched], asked: Asked
) -> None:
    one = watched(HTTP)
    pids = one.daemon.worker_pids()
    one.daemon.log.wait_for("event=healthy generation=1")
    assert one.until(state="healthy", last="")["failures"] == 0

    mark = len(one.daemon.log.seen)
    asked.bad()
    line = one.daemon.log.wait_for("event=unhealthy generation=1", after=mark)
    assert GONE.replace('"', r"\"") in line
    assert one.until(state="unhealthy", last=GONE)["failures"] >= 3
    more = one.says["failures"]
    eventually(lambda: one.says["failures"] > more, "another bad answer")
    asked.good()
    one.daemon.log.wait_for("event=healthy generation=1", after=mark)

    assert one.until(state="healthy", last="", failures=0)["probe"] == HTTP
    assert one.daemon.log.count("event=unhealthy") == 1
    assert one.daemon.worker_pids() == pids
    assert probers(one.daemon) == []
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_fewer_bad_answers_than_asked_for_change_nothing(
    watched: Callable[..., Watched], asked: Asked
) -> None:
    one = watched(HTTP, "--health-failures", "1000000")
    one.until(state="healthy")
    asked.bad()

    one.until(last=GONE)
    assert one.says["state"] == "healthy"
    assert "event=unhealthy" not in one.daemon.log.text()


@EITHER_HANDOFF
@pytest.mark.costly
def test_it_is_in_no_count(watched: Callable[..., Watched], asked: Asked) -> None:
    one = watched(HTTP)
    one.until(state="healthy")
    for _ in range(3):
        get(one.one.address[1])
    asked.silent()  # so that a question is under way
    one.until(last="GET /healthz: no answer within 2s")

    found = one.one.status()
    [generation] = found["generations"]
    if found["forwarded"] is not None:
        assert found["forwarded"] == generation["accepted"] == 3
        assert generation["active"] <= 1  # by a worker that counts what it has open
    else:
        eventually(
            lambda: one.one.status()["generations"][0]["active"] == 0, "no client's connection"
        )
    asked.good()
    one.daemon.stop()
    stopped = one.daemon.log.wait_for("event=stopped")
    assert "lost=" not in stopped


@EITHER_HANDOFF
@pytest.mark.parametrize("kind", ["accept", HTTP])
@pytest.mark.costly
def test_a_question_that_no_worker_takes_is_busy_and_no_failure(
    watched: Callable[..., Watched], asked: Asked, kind: str
) -> None:
    asked.becomes("--never")
    limit = ("--health-failures", "1", "--health-timeout", "100ms")
    one = watched(kind, "--ready", "after:0s", "--drain-timeout", "1s", *limit)

    one.until(last="busy: no worker has accepted the probe yet")
    for _ in range(5):
        assert one.says["state"] == "unknown"
        assert one.one.status()["generations"][0]["queue"] == 1  # the same one
    assert "event=unhealthy" not in one.daemon.log.text()
    asked.becomes()
    one.daemon.reload()
    one.until(state="healthy")
    one.daemon.log.wait_for("event=drained generation=1")
    one.daemon.stop()
    assert "event=stranded" not in one.daemon.log.text()
    assert "lost=" not in one.daemon.log.wait_for("event=stopped")


@EITHER_HANDOFF
@pytest.mark.parametrize("kind", ["accept", HTTP])
def test_a_generation_whose_workers_die_at_their_start_is_unhealthy(
    watched: Callable[..., Watched], asked: Asked, kind: str
) -> None:
    one = watched(kind, "--health-timeout", "100ms")
    one.until(state="healthy")
    asked.release.becomes("false")
    for pid in one.daemon.worker_pids():
        os.kill(pid, signal.SIGKILL)

    one.until(state="unhealthy", last="no worker is ready")
    asked.becomes()
    one.until(state="healthy")


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_server_that_takes_it_and_hangs_is_unhealthy(
    watched: Callable[..., Watched], asked: Asked
) -> None:
    asked.silent()
    one = watched(HTTP, "--health-timeout", "100ms")

    one.until(state="unhealthy", last="GET /healthz: no answer within 100ms")
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_reload_begins_anew_and_may_change_what_is_asked(
    protector: Starter, asked: Asked, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"

    def write(health: str) -> None:
        config.write_text(
            f'listen = "127.0.0.1:0"\ncommand = ["{asked.release.path}"]\n{health}\n',
            encoding="utf-8",
        )

    asked.speaks_tls()
    write("")
    daemon = protector("--config", config, "--ready", "accept").ready()
    assert probers(daemon) == []
    write(f'health = "{HTTPS}"\nhealth-every = "100ms"')
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=configured .*health: none -> https:/healthz", after=mark)
    daemon.log.wait_for("event=healthy generation=2", after=mark)
    [first] = probers(daemon)
    asked.bad()
    daemon.log.wait_for("event=unhealthy generation=2", after=mark)
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=unhealthy generation=3", after=mark)
    assert probers(daemon) == [first]  # it goes on
    write("")
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=reloaded generation=4", after=mark)
    eventually(lambda: probers(daemon) == [], "the end of what has asked")
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.parametrize("how", ["upgrade", "kill"])
@pytest.mark.costly
def test_another_protector_asks_anew(
    watched: Callable[..., Watched], asked: Asked, how: str
) -> None:
    asked.speaks_tls()
    one = watched(HTTPS, "--guard")
    one.daemon.log.wait_for("event=healthy")
    asked.bad()
    one.daemon.log.wait_for("event=unhealthy")
    before = probers(one.daemon)

    mark = len(one.daemon.log.seen)
    if how == "upgrade":
        assert "event=resumed" in upgrade(one.daemon)
    else:
        revived(one.daemon, kill_protector(one.daemon))
    one.daemon.log.wait_for("event=unhealthy generation=1", after=mark)
    assert wait_gone(before) == []
    asked.good()
    one.daemon.log.wait_for("event=healthy generation=1", after=mark)
    found = one.one.line().ask("history")["history"]
    # Noted once, though the next protector found it out again.
    assert [each["result"] for each in found] == ["unhealthy", "healthy"]
    one.daemon.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_prober_that_dies_or_hangs_is_no_failure_and_is_followed_by_another(
    watched: Callable[..., Watched], asked: Asked, how: signal.Signals
) -> None:
    asked.speaks_tls()
    one = watched(HTTPS, "--health-failures", "1", "--health-timeout", "2s")
    one.until(state="healthy")
    [first] = probers(one.daemon)
    answered = one.says["answered_at"]
    os.kill(first, how)

    eventually(lambda: probers(one.daemon) not in ([], [first]), "another prober")
    eventually(lambda: one.says["answered_at"] > answered + 0.5, "its answer")
    one.until(state="healthy", last="")
    assert "event=unhealthy" not in one.daemon.log.text()
    assert wait_gone([first]) == []
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_protector_that_can_open_nothing_does_not_know(
    watched: Callable[..., Watched], asked: Asked
) -> None:
    one = watched("accept")
    one.until(state="healthy")
    limits = resource.prlimit(one.daemon.pid, resource.RLIMIT_NOFILE)

    resource.prlimit(one.daemon.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    line = one.daemon.log.wait_for("event=health-unknown generation=1")
    assert "not probed: Too many open files" in line
    mark = len(one.daemon.log.seen)
    resource.prlimit(one.daemon.pid, resource.RLIMIT_NOFILE, limits)

    one.daemon.log.wait_for("event=healthy generation=1", after=mark)
    assert "event=unhealthy" not in one.daemon.log.text()
    one.daemon.stop()


@EITHER_HANDOFF
def test_a_command_asks_where_it_is_told(watched: Callable[..., Watched], asked: Asked) -> None:
    one = watched(check(asked), "--health-timeout", "60s")
    one.until(state="healthy")
    assert probers(one.daemon) == []
    asked.bad()

    found = one.until(state="unhealthy")
    name = os.path.basename(sys.executable)
    assert found["last"] == f"{name}: exited with status 1"
    assert found["probe"] == f"check:{name}"
    one.daemon.stop()


def test_a_command_that_hangs_is_ended(watched: Callable[..., Watched], gate: Gate) -> None:
    one = watched(f"check:cat {gate.path}", "--health-timeout", "100ms")

    one.until(state="unhealthy", last="cat: no answer within 100ms")
    left = children_of(one.daemon.pid)
    one.daemon.stop()
    assert wait_gone(left) == []


@EITHER_HANDOFF
@pytest.mark.parametrize("kind", ["accept", HTTP, "check"])
@pytest.mark.costly
def test_a_unix_socket_is_asked_as_well(
    operated: Operating, asked: Asked, tmp_path: Path, kind: str
) -> None:
    kind = 'check:test "$SOCKETPROTECTOR_PROBE"' if kind == "check" else kind
    options = ("--health", kind, *OFTEN, "--ready", "after:0s", f"unix:{tmp_path / 's'}")
    one = Watched(operated(*options, command=(str(asked.release.path),)))

    one.until(state="healthy")
    one.daemon.stop()


@pytest.mark.parametrize("kind", ["accept", HTTP])
@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.costly
def test_a_path_is_unhealthy_while_it_leads_no_client_to_the_workers(
    operated: Operating, asked: Asked, tmp_path: Path, kind: str, theirs: bool
) -> None:
    path = tmp_path / "s"
    options = ("--handoff", "listener", "--health", kind, *OFTEN, "--ready", "accept")
    command = (str(asked.release.path),)
    one = Watched(operated(*options, f"unix:{path}", command=command))
    one.until(state="healthy")

    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        if theirs:
            other.bind(str(path))
            other.listen()
        one.until(state="unhealthy")
    path.unlink(missing_ok=True)
    one.daemon.reload()
    one.until(state="healthy")
    one.daemon.stop()


@pytest.mark.costly
def test_a_path_whose_clients_reach_the_workers_is_healthy_though_other_files_were_removed(
    operated: Operating, asked: Asked, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "s"
    options = ("--handoff", "listener", "--health", HTTP, *OFTEN, "--health-failures", "2")
    one = Watched(operated(*options, f"unix:{path}", command=(str(asked.release.path),)))
    one.until(state="healthy")
    for each in folder.iterdir():
        if each != path:
            each.unlink()

    eventually(lambda: len([*folder.iterdir()]) == 2, "the path's socket has its file again")
    asked.bad()
    assert "500" in one.daemon.log.wait_for("event=unhealthy")
    one.daemon.stop()


@pytest.mark.costly
def test_under_a_hold_nothing_is_asked_where_no_client_would_get_an_answer(
    operated: Operating, asked: Asked
) -> None:
    one = Watched(
        operated(
            *("--handoff", "listener", "--health", HTTP, *OFTEN, "--health-timeout", "100ms"),
            command=(str(asked.release.path),),
        )
    )
    one.until(state="healthy")
    with one.one.line() as line:
        line.ask("hold", seconds=1000)
        asked.bad()
        for _ in range(20):
            assert line.status()["health"]["state"] == "healthy"
        line.ask("release")
    one.until(state="unhealthy", last=GONE)
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_socket_that_was_passed_in_is_asked_as_well(
    marked_environment: dict[str, str], handed_over: tuple[str, ...], asked: Asked
) -> None:
    """Though it has no second one."""
    giver = Giver(marked_environment)
    try:
        giver.tcp("web")
        words = (*handed_over, "--health", HTTP, *OFTEN, "--ready", "after:0s", "fd:web", "--")
        daemon = giver.start(*words, str(asked.release.path)).ready()
        daemon.log.wait_for("event=healthy generation=1")
        asked.bad()
        daemon.log.wait_for("event=unhealthy generation=1")
        daemon.stop()
    finally:
        giver.close()


@pytest.mark.costly
def test_a_program_for_each_connection_is_asked(operated: Operating, tmp_path: Path) -> None:
    says = tmp_path / "says"
    says.write_text("200 fine")
    script = f"read line; echo HTTP/1.0 $(cat {says}); echo"
    words = ("--handoff", "stdio", "--shell", "--health", HTTP, *OFTEN)
    one = Watched(operated(*words, command=(script,)))
    one.until(state="healthy")

    says.write_text("503 gone")
    one.until(state="unhealthy", last="GET /healthz: 503, gone")
    one.daemon.stop()
