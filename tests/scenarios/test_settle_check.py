"""--settle-check: the new generation is asked while the old one stands by, and may yield to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.load import Load
from tests.procfs import children_of
from tests.running import Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import at_rest, kill_protector, revived, served, upgrade
from tests.scenarios.operating import MANY, Operating, nothing_of
from tests.scenarios.probed import Asked, get, probers
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    NOBODY,
    Gate,
    Release,
    hold,
    pid_in,
    spawned,
    worker,
)

Starter = Callable[..., Protector]
HTTP = ("--ready", "accept", "--settle-check", "http:/healthz")
LONG = ("--settle", "60s")


class Check:
    """A command that fails as long as a file is there, and says what stands in it."""

    def __init__(self, folder: Path) -> None:
        self.told, self._bad = folder / "told", folder / "bad"
        new = self.told.with_suffix(".new")
        self.words = (
            "--settle-check",
            f"check:cat > {new} && mv {new} {self.told}; ! cat {self._bad} 2>/dev/null",
        )

    def bad(self, why: str = "40 % of all requests fail") -> None:
        new = self._bad.with_suffix(".new")
        new.write_text(f"a first line\n{why}\n")
        new.rename(self._bad)

    def heard(self) -> dict[str, Any]:
        """What the next one reads on stdin."""
        self.told.unlink(missing_ok=True)
        eventually(self.told.exists, "the next check")
        found: dict[str, Any] = json.loads(self.told.read_text())
        return found


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "release")
    made.becomes(*MANY)
    return made


def settling(daemon: Protector) -> int:
    """Reload, and wait for the switch; return the log's length before."""
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=route generation=2", after=mark)
    return mark


def rolled_back(daemon: Protector, mark: int) -> str:
    """Wait for the verdict, which must be that; return its line."""
    line = daemon.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
    assert "event=reload-failed generation=2" in line
    return line


def events_after(daemon: Protector, mark: int) -> list[str]:
    return [line.partition("event=")[2] for line in list(daemon.log.seen)[mark:]]


# -- what becomes of a generation ------------------------------------------------------------


@EITHER_HANDOFF
def test_one_that_answers_well_serves_when_the_time_is_over(
    operated: Operating, asked: Asked
) -> None:
    """And no sooner than it has answered after that."""
    one = operated("--settle", "500ms", *HTTP, command=(str(asked.release.path),))
    old = get(one.address[1])
    line = one.line(follows=True)
    asked.silent()  # before the reload, which a busy machine could end first
    settling(one.daemon)
    nothing_of(line, ("reloaded", "reload-failed"), 1.0)

    asked.good()

    line.event("reloaded", generation=2)
    assert get(one.address[1]) != old
    assert probers(one.daemon) == []
    one.daemon.stop()


@EITHER_HANDOFF
def test_a_bad_answer_gives_the_clients_back_to_the_one_that_stands_by(
    operated: Operating, asked: Asked
) -> None:
    one = operated(*LONG, *HTTP, command=(str(asked.release.path),))
    old = get(one.address[1])
    trying = Running("--control", str(one.path), "reload")
    try:
        one.daemon.log.wait_for("event=route generation=2")
        assert one.until("phase", "settling")["route"] == 2
        assert get(one.address[1]) == f"[{spawned(one.daemon, 2)[0]}]"
        mark = len(one.daemon.log.seen)

        asked.bad()

        assert trying.wait() == 3
    finally:
        trying.end()
    reason = (
        'failed: --settle-check: GET /healthz: 500, "database gone"; generation 1 is still serving'
    )
    assert reason in trying.err.text()
    assert get(one.address[1]) == old
    said = events_after(one.daemon, mark)
    at = [n for n, each in enumerate(said) if each.startswith("route generation=1")]
    assert at
    ends = ("signalled", "retired", "reload-failed", "exited", "drained")
    assert not [each for each in said[: at[0]] if each.startswith(ends)]
    one.daemon.log.wait_for("event=drained generation=2")
    assert probers(one.daemon) == []
    assert one.status()["phase"] == "serving"
    one.daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_hold_makes_no_difference(operated: Operating, asked: Asked) -> None:
    one = operated(*LONG, *HTTP, command=(str(asked.release.path),))
    mark = settling(one.daemon)
    with one.line() as line:
        line.ask("hold", seconds=1000)

        asked.bad()

        assert "--settle-check: GET /healthz: 500" in rolled_back(one.daemon, mark)
        line.ask("stop", quick=True)
    one.daemon.wait()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_command_decides_by_its_own_measure_and_no_client_fails(
    protector: Starter, release: Release, check: Check
) -> None:
    daemon = protector(*LONG, *check.words, "127.0.0.1:0", "--", release.path).ready()

    with Load(f"127.0.0.1:{daemon.port}", concurrency=4) as load:
        served(load)
        mark = settling(daemon)
        [old, new] = spawned(daemon)
        load.wait_for(lambda now: new in now.pids)
        check.bad()
        line = rolled_back(daemon, mark)
        served(load, 100)
    assert not load.snapshot().failures

    assert "--settle-check: cat: exited with status 1: 40 % of all requests fail" in line
    assert pid_in(ask(("127.0.0.1", daemon.port))) == old
    daemon.log.wait_for("event=drained generation=2")
    assert wait_gone([new]) == []
    daemon.stop()


@pytest.mark.costly
def test_what_it_has_not_taken_goes_back(
    protector: Starter, release: Release, check: Check
) -> None:
    daemon = protector(*LONG, *check.words, "127.0.0.1:0", "--", release.path).ready()
    mark = settling(daemon)
    [old, new] = spawned(daemon)
    hold(new)
    waiting = [Client(("127.0.0.1", daemon.port), f"hello {n}") for n in range(5)]
    assert not any(each.has_answer() for each in waiting)

    check.bad()

    rolled_back(daemon, mark)
    for number, client in enumerate(waiting):
        assert client.hear() == f"[{old}] hello {number}"
        client.close()
    os.kill(new, signal.SIGCONT)
    daemon.stop()


#: Connect 300 times, and send nothing until stdin ends.
SILENT = """
import socket, sys
kept = []
for _ in range(300):
    kept.append(socket.socket())
    kept[-1].setblocking(False)
    kept[-1].connect_ex(("127.0.0.1", int(sys.argv[1])))
print(flush=True)
sys.stdin.read()
"""


@needs.ANOTHER_USER
@EITHER_HANDOFF
def test_silent_connections_of_another_user_fail_no_check(
    protector: Starter, release: Release, tmp_path: Path
) -> None:
    told, flooded = tmp_path / "told", tmp_path / "flooded"
    release.becomes(*worker("ready_at_gate", "/dev/null"))  # serves one client after the other
    script = (
        "import os,pathlib,socket,sys,time\n"
        "at=os.environ['SOCKETPROTECTOR_PROBE'].split(':')\n"
        "pathlib.Path(sys.argv[1]).with_suffix('.new').write_text(at[1])\n"
        "os.rename(sys.argv[1]+'.new',sys.argv[1])\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(.01)\n"
        "one=socket.create_connection(at)\n"
        "one.sendall(b'hello\\n')\n"
        "assert b'hello' in one.recv(99)\n"
    )
    check = f'check:{sys.executable} -S -c "{script}" {told} {flooded}'
    words = ("--settle", "100ms", "--settle-check", check, "127.0.0.1:0", "--", release.path)
    daemon = protector(*words).ready()
    mark = daemon.signal(signal.SIGHUP)
    eventually(told.exists, "the probe address")
    flood = [sys.executable, "-S", "-c", SILENT, told.read_text()]
    with subprocess.Popen(
        flood, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=NOBODY, cwd="/"
    ) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline()
        flooded.touch()

        said = daemon.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)

        assert "event=reloaded generation=2" in said
        stranger.communicate()
    daemon.stop()


# -- what a command is told, and may do ------------------------------------------------------


@pytest.mark.parametrize("handoff", ["connection"], indirect=True)
@pytest.mark.costly
def test_it_is_told_what_is_counted_of_both(protector: Starter, asked: Asked, check: Check) -> None:
    words = ("--workers", "2", *LONG, *check.words, "127.0.0.1:0", "--", asked.release.path)
    daemon = protector(*words).ready()
    for _ in range(3):
        get(daemon.port)
    settling(daemon)
    get(daemon.port)
    eventually(lambda: check.heard()["new"]["accepted"] == 1, "what it has accepted")

    found = check.heard()

    new, old = found["new"], found["old"]
    assert (new["number"], new["phase"], new["workers"]) == (2, "settling", 2)
    assert (old["number"], old["phase"], old["workers"]) == (1, "serving", 2)
    assert (new["accepted"], new["active"], new["queue"], new["lost"]) == (1, 0, 0, 0)
    assert (old["accepted"], old["errors"], old["lost"]) == (3, 0, 0)
    daemon.stop()


def test_what_nobody_counts_is_null(protector: Starter, release: Release, check: Check) -> None:
    daemon = protector(*LONG, *check.words, "127.0.0.1:0", "--", release.path).ready()
    settling(daemon)

    new = check.heard()["new"]

    assert (new["accepted"], new["errors"], new["lost"]) == (None, None, None)
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_it_reaches_the_new_one_alone_at_the_probe_address(
    protector: Starter, asked: Asked, tmp_path: Path
) -> None:
    """Every second, until it has done so a few times."""
    heard = tmp_path / "heard"
    script = (
        "import os,sys,urllib.request as u\n"
        "a=u.urlopen('http://'+os.environ['SOCKETPROTECTOR_PROBE']+'/',timeout=60)\n"
        "open(sys.argv[1],'a').write(a.read().decode())"
    )
    check = f'{sys.executable} -c "{script}" {heard}'
    words = ("--ready", "accept", "--settle", "2s", "--settle-check", check)
    daemon = protector(*words, "127.0.0.1:0", "--", asked.release.path).ready()
    daemon.reload()

    told = heard.read_text().split()

    assert len(told) >= 2
    assert {*told} == {f"[{spawned(daemon, 2)[0]}]"}
    eventually(lambda: probers(daemon) == [], "the end of what forwards it")
    daemon.stop()


@pytest.mark.parametrize(("more", "last"), [("", "the last"), ("setsid yes &", "")])
def test_of_much_that_it_says_the_last_line_is_the_reason(
    protector: Starter, release: Release, more: str, last: str
) -> None:
    """And nothing that writes on for ever keeps the protector."""
    say = f"{more} seq 9000; echo the last; exit 1"
    daemon = protector(*LONG, "--settle-check", say, "127.0.0.1:0", "--", release.path).ready()
    mark = settling(daemon)

    assert f"exited with status 1: {last}" in rolled_back(daemon, mark)
    daemon.stop()


@pytest.fixture
def hanging(protector: Starter, release: Release, tmp_path: Path) -> Protector:
    """A protector whose check hangs; `pid` of this folder has its pid."""
    hangs = f"echo $$ > {tmp_path / 'pid'}; sleep 1000"
    words = (*LONG, "--settle-check", hangs, "127.0.0.1:0", "--", release.path)
    return protector(*words).ready()


@pytest.mark.costly
def test_one_that_hangs_is_killed_and_is_a_bad_answer(hanging: Protector, tmp_path: Path) -> None:
    mark = settling(hanging)

    line = rolled_back(hanging, mark)

    assert "--settle-check: echo: no answer within 10s" in line
    assert wait_gone([int((tmp_path / "pid").read_text())]) == []
    hanging.stop()


def test_the_last_word_is_a_good_answer_however_short_the_time(
    operated: Operating, release: Release, gate: Gate
) -> None:
    words = ("--settle", "100ms", "--settle-check", f"cat {gate.path}")
    one = operated(*words, command=(str(release.path),))
    line = one.line(follows=True)
    settling(one.daemon)

    nothing_of(line, ("reloaded", "reload-failed"), 0.5)
    gate.open()

    line.event("reloaded", generation=2)
    one.daemon.stop()


# -- whatever happens meanwhile --------------------------------------------------------------


@EITHER_HANDOFF
@pytest.mark.parametrize("how", ["upgrade", "kill"])
@pytest.mark.costly
def test_another_protector_asks_on(
    protector: Starter, release: Release, check: Check, how: str
) -> None:
    words = ("--guard", *LONG, *check.words, "127.0.0.1:0", "--", release.path)
    daemon = protector(*words).ready()
    mark = settling(daemon)
    at_rest(daemon)
    [old, new] = spawned(daemon)

    if how == "upgrade":
        assert "event=resumed" in upgrade(daemon)
    else:
        revived(daemon, kill_protector(daemon))
    assert check.heard()["new"]["number"] == 2
    assert pid_in(ask(("127.0.0.1", daemon.port))) == new
    check.bad()

    rolled_back(daemon, mark)
    assert pid_in(ask(("127.0.0.1", daemon.port))) == old
    daemon.stop()


@pytest.mark.costly
def test_a_prober_that_dies_is_followed_by_another(protector: Starter, asked: Asked) -> None:
    asked.speaks_tls()
    secure = ("--ready", "accept", "--settle-check", "https:/healthz")
    daemon = protector(*LONG, *secure, "127.0.0.1:0", "--", asked.release.path).ready()
    mark = settling(daemon)
    eventually(lambda: len(probers(daemon)) == 1, "a prober")
    [first] = probers(daemon)

    os.kill(first, signal.SIGKILL)

    eventually(lambda: [*probers(daemon), first] != [first], "another prober")
    eventually(lambda: first not in probers(daemon), "the end of the first")
    asked.bad()
    assert "GET /healthz: 500" in rolled_back(daemon, mark)
    daemon.stop()


def test_a_stop_ends_it_and_the_new_one_serves_to_the_end(
    hanging: Protector, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    settling(hanging)
    eventually(lambda: pid.exists() and bool(pid.read_text()), "the check")

    hanging.stop()

    assert wait_gone([int(pid.read_text())]) == []
    assert "event=reload-failed" not in hanging.log.text()


def test_from_the_answer_to_the_switch(
    protector: Starter, release: Release, tmp_path: Path
) -> None:
    """No timing decides: the figure is for whoever reads the output."""
    bad = tmp_path / "bad"
    say = f"! test -e {bad} || {{ date +%s.%N; exit 1; }}"
    daemon = protector(*LONG, "--settle-check", say, "127.0.0.1:0", "--", release.path).ready()
    mark = settling(daemon)
    bad.touch()

    line = rolled_back(daemon, mark)

    answered = float(line.partition("status 1: ")[2].strip('"\n'))
    [back] = [each for each in list(daemon.log.seen)[mark:] if "event=route generation=1" in each]
    at = datetime.fromisoformat(back.split()[0]).timestamp()
    print(f"from the bad answer to the switch: {1000 * (at - answered):.0f} ms")
    assert children_of(daemon.pid)
    daemon.stop()


@pytest.mark.costly
def test_programs_of_stdio_are_asked_as_any_client_asks_them(
    operated: Operating, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("200 fine")
    says = f'read -r line; printf "HTTP/1.0 %s\\r\\n\\r\\n" "$(cat {status})"'
    words = ("--handoff", "stdio", "--shell", *LONG, "--settle-check", "http:/")
    one = operated(*words, command=(says,))
    mark = settling(one.daemon)

    status.write_text("500 gone")

    assert "--settle-check: GET /: 500, gone" in rolled_back(one.daemon, mark)
    one.daemon.stop()
