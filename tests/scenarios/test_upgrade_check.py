"""upgrade --check: the installed program runs on a copy of the state, and nothing else happens."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector import __version__
from socketprotector.daemon.upgrade import TRIAL_S
from tests.load import Load
from tests.procfs import children_of, name_of
from tests.running import DEADLINE_S, Client, Protector, eventually
from tests.scenarios.adopting import Installation, kill_protector, served, upgrade
from tests.scenarios.operating import Line
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    kinds_at_rest,
    no_more_open,
    worker,
)
from tests.unit.ctl.conftest import run

MANY = worker("many")


@pytest.fixture
def web(installation: Installation, place: Path) -> Protector:
    """A protector of release `one`, which is about to be replaced by `two`."""
    options: tuple[str | Path, ...] = ("--control", place, "--workers", "2")
    daemon = installation.start(*options, "127.0.0.1:0", "--", *MANY).ready()
    installation.add("two", version="9.8.7")
    installation.switch("two")
    return daemon


@pytest.fixture
def beside(place: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*arguments: str) -> Running:
        started.append(Running("--control", str(place), *arguments))
        return started[-1]

    yield start
    for each in started:
        each.end()


@EITHER_HANDOFF
def test_a_program_that_can_take_over_is_said_in_one_line_and_nothing_changes(
    web: Protector, place: Path, installation: Installation
) -> None:
    descriptors, workers = kinds_at_rest(web), web.worker_pids()
    mark = len(web.log.seen)
    with Load(f"127.0.0.1:{web.port}") as load, Line(place) as line:
        before = line.status()
        said = run("--control", str(place), "upgrade", "--check")
        assert (said.status, said.err) == (0, "")
        assert said.out == f"9.8.7 can take over from {__version__}\n"
        asked = run("--control", str(place), "upgrade", "--check", "--json")
        expected = {"from": __version__, "version": "9.8.7", "reason": None}
        assert (asked.status, json.loads(asked.out)) == (0, expected)
        after = line.status()
        served(load)
    assert load.snapshot().failures == ()

    same = ("pid", "restarts", "version", "phase", "route", "reloads", "started_at")
    assert [before[name] for name in same] == [after[name] for name in same]
    assert web.log.seen[mark:] == []
    no_more_open(descriptors, web.pid)
    assert sorted(web.worker_pids()) == sorted(workers)
    assert re.search(r"event=resumed .* version=9\.8\.7", upgrade(web))
    web.stop()


def future_state(installation: Installation) -> str:
    installation.change("two", "model/codec", r"FORMAT = 3", "FORMAT = 2")
    return r"written by a newer version \(format 3, this one reads up to 2\)"


def later_format(installation: Installation) -> str:
    installation.change("two", "model/codec", r"FORMAT = 3", "FORMAT = 4")
    return r"written by an older version \(format 3, this one reads only 4\); stop that version"


def future_field(installation: Installation) -> str:
    installation.change("two", "model/settings", r"    workers: int = 1\n", "")
    return r"written by a newer version \(this one does not know workers\)"


def missing_module(installation: Installation) -> str:
    (installation.folder / "two/socketprotector/daemon/delivery/queue/forwarder.py").unlink()
    return r"ModuleNotFoundError: No module named 'socketprotector\.daemon\.delivery\.queue\.forwar"


def missing_late_module(installation: Installation) -> str:
    (installation.folder / "two/socketprotector/daemon/health.py").unlink()
    return r"ImportError: cannot import name 'health' from 'socketprotector\.daemon'"


def module_missing_at_a_reload(installation: Installation) -> str:
    (installation.folder / "two/socketprotector/launch/toml_lines.py").unlink()
    return r"cannot import name 'toml_lines'"


def missing_program(installation: Installation) -> str:
    (installation.folder / "two/socketprotector/programs/prober.py").unlink()
    return r"No such file or directory: '.*/programs/prober\.py'"


def missing_program_of_workers(installation: Installation) -> str:
    (installation.folder / "two/socketprotector/programs/stdio/pool.py").unlink()
    return r"ModuleNotFoundError: No module named 'socketprotector\.programs\.stdio\.pool'"


def syntax_error(installation: Installation) -> str:
    module = "daemon/delivery/queue/forwarder"
    installation.change("two", module, r"class Forwarder:", "class Forwarder")
    return r"SyntaxError: expected ':' \(.*/forwarder\.py, line \d+\)"


def syntax_error_in_a_program(installation: Installation) -> str:
    installation.change("two", "programs/log_relay", r"def main\(", "def main")
    return r"SyntaxError: .* \(.*/programs/log_relay\.py, line \d+\)"


def no_package(installation: Installation) -> str:
    shutil.rmtree(installation.folder / "two")
    return r"not found|No such file or directory"


SPOILS = [
    *(future_state, later_format, future_field, missing_module, missing_late_module),
    *(module_missing_at_a_reload, missing_program),
    *(missing_program_of_workers, syntax_error, syntax_error_in_a_program, no_package),
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_program_that_cannot_take_over_is_status_3_and_one_line(
    spoil: Callable[[Installation], str], web: Protector, place: Path, installation: Installation
) -> None:
    descriptors = kinds_at_rest(web)
    mark = len(web.log.seen)
    why = spoil(installation)

    said = run("--control", str(place), "upgrade", "--check")

    assert (said.status, said.out) == (3, "")
    [line] = said.lines
    assert line.startswith(f"socketprotectorctl: {__version__} cannot be upgraded: "), line
    assert re.search(why, line), line
    assert web.log.seen[mark:] == []
    no_more_open(descriptors, web.pid)
    web.reload()
    web.stop()


@pytest.mark.parametrize(
    ("options", "module", "old", "new", "why"),
    [
        ((), "model/handoff_modes", r'HandoffMode\("connection"', 'HandoffMode("q"', "handoff"),
        ((), "model/ready_kinds", r'    "notify": ReadyKind', '    "sent": ReadyKind', "ready"),
        (
            ("--ready", "accept"),
            *("model/probe_spec", 'if text == "accept"', 'if text == "dial"', "ready_question"),
        ),
        (
            ("--health", "accept"),
            *("model/probe_spec", 'if text == "accept"', 'if text == "dial"', "health"),
        ),
        (
            ("--settle", "1s", "--settle-check", "true"),
            *("model/probe_spec", 'CHECK = "check"', 'CHECK = "command"', "settle_check"),
        ),
        (
            ("--limit", "core=0"),
            *("model/settings", r'LIMITS = \("nofile", "core"\)', 'LIMITS = ("nofile",)', "limits"),
        ),
        (("-v",), "model/log_format", '"debug": 7', '"trace": 7', "log_level"),
        (
            (),
            "model/log_format",
            r'FORMATS = \("text", "json"\)',
            'FORMATS = ("json",)',
            "log_form",
        ),
    ],
)
def test_a_program_that_lacks_a_value_in_use_does_not_take_over(
    options: tuple[str, ...],
    module: str,
    old: str,
    new: str,
    why: str,
    place: Path,
    installation: Installation,
) -> None:
    daemon = installation.start("--control", place, *options, "127.0.0.1:0", "--", *MANY).ready()
    installation.add("two", version="9.8.7")
    installation.change("two", module, old, new)
    installation.switch("two")
    why = rf"written by a newer version \(this one does not know {why}"

    said = run("--control", str(place), "upgrade", "--check")

    assert (said.status, said.out) == (3, "")
    [line] = said.lines
    assert re.search(why, line), line
    assert re.search(rf"event=upgrade-failed .*{why}", upgrade(daemon))
    installation.switch("one")
    daemon.reload()
    daemon.stop()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("model/probe_spec", 'if text == "accept"', 'if text == "dial"'),
        ("core/fleet", 'OFF = "off"', 'OFF = "none"'),  # of LameDuck
    ],
)
def test_after_a_kill_clients_wait_for_files_that_know_each_value(
    module: str, old: str, new: str, place: Path, installation: Installation, tmp_path: Path
) -> None:
    """The settings of the start, which the guard keeps too, have no such value."""
    config = tmp_path / "config"
    config.write_text("")
    options = ("--guard", "--pid-file", tmp_path / "pid", "--control", place, "--config", config)
    daemon = installation.start(*options, "127.0.0.1:0", "--", *MANY).ready()
    config.write_text('health = "accept"\n')
    daemon.reload()
    installation.add("two", version="9.8.7")
    installation.change("two", module, old, new)
    installation.switch("two")

    mark = kill_protector(daemon)
    why = 'error="cannot resume: .*this one does not know '
    daemon.log.wait_for(
        f'event=protector-died protector="exited with status 1" .*{why}', after=mark
    )
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        installation.switch("one")
        assert client.hear()
    daemon.log.wait_for("event=resumed", after=mark)
    daemon.reload()
    daemon.stop()


def test_a_guard_says_why_no_protector_can_resume_and_its_stop_leaves_no_file(
    place: Path, installation: Installation, tmp_path: Path
) -> None:
    """Its log is JSON, and so is the reason.  The start's settings have a newer value."""
    path, pid_file = tmp_path / "s", tmp_path / "pid"
    options = ("--guard", "--pid-file", pid_file, "--control", place, "--log-format", "json")
    command = ("--health", "accept", f"unix:{path}", "--", *MANY)
    daemon = installation.start(*options, *command)
    daemon.log.wait_for('"event": *"ready"')
    [notify] = place.parent.glob(".notify-*")
    installation.add("two", version="9.8.7")
    installation.change("two", "model/probe_spec", 'if text == "accept"', 'if text == "dial"')
    installation.switch("two")

    mark = len(daemon.log.seen)
    [pid] = [pid for pid in children_of(daemon.pid) if name_of(pid) == "SocketProtector"]
    os.kill(pid, signal.SIGKILL)

    daemon.log.wait_for(
        r'"protector-died", "protector": "exited with status 111",.* "error": "the settings '
        r"cannot be read: written by a newer version \(this one does not know health 'accept'\)",
        after=mark,
    )
    daemon.signal(signal.SIGTERM)
    daemon.process.wait(DEADLINE_S)
    line = daemon.log.wait_for('"event": *"guard-gives-up"', after=mark)
    assert "this one does not know" in json.loads(line)["error"]
    eventually(lambda: not os.listdir(tmp_path), "the removal of its files")
    assert not notify.exists()
    for each in daemon.log.seen[mark:]:
        json.loads(each)


def test_without_a_guard_a_refused_state_leaves_nothing(
    place: Path, installation: Installation, tmp_path: Path
) -> None:
    """The files change between the trial and the exec: no program will come that could resume."""
    path, pid_file = tmp_path / "s", tmp_path / "pid"
    options = ("--control", place, "--pid-file", pid_file)
    daemon = installation.start(*options, f"unix:{path}", "--", *MANY).ready()
    installation.add("two", version="9.8.7")
    found = "            earlier = checkpoint.read(descriptors[inherited.STATE])\n"
    refused = '            raise NewerStateError("a newer version has written it")\n'
    installation.change("two", "daemon/resident", re.escape(found), refused)
    installation.switch("two")

    daemon.signal(signal.SIGUSR2)

    assert daemon.process.wait(DEADLINE_S) == 111
    daemon.log.wait_for("SocketProtector: .*a newer version has written it")
    assert not any(each.exists() for each in (path, pid_file, place))


# -- what happens during a check -------------------------------------------------------------


class Waiting:
    """A check whose program does not answer until it is killed."""

    def __init__(self, running: Running, pid: int) -> None:
        """pid: of the checked program."""
        self.running = running
        self.pid = pid


@pytest.fixture
def waiting(web: Protector, installation: Installation, beside: Callable[..., Running]) -> Waiting:
    there = installation.folder / "there"
    installation.script(
        "two",
        f"if 'sp.check' in os.environ.get('LISTEN_FDNAMES', ''):\n"
        f"    os.symlink(str(os.getpid()), {str(there)!r})\n    import signal\n    signal.pause()\n"
        "from socketprotector.__main__ import main\nmain()\n",
    )
    running = beside("upgrade", "--check")
    eventually(there.is_symlink, "the checked program")
    return Waiting(running, int(there.readlink().name))


def reaped(daemon: Protector, pid: int) -> None:
    eventually(lambda: pid not in children_of(daemon.pid), "the end of the checked program")


@pytest.mark.costly
def test_a_second_check_is_refused_and_the_first_goes_on(
    web: Protector, place: Path, waiting: Waiting
) -> None:
    with Line(place) as line:
        code, words = line.refused("upgrade", check=True)
    assert (code, words) == (
        "busy",
        "an upgrade or an upgrade check is in progress; try again later",
    )
    os.kill(waiting.pid, signal.SIGKILL)
    assert waiting.running.wait() == 3
    assert "the new program was killed by SIGKILL" in waiting.running.err.text()
    web.stop()


@pytest.mark.costly
def test_an_upgrade_calls_a_check_off(web: Protector, waiting: Waiting) -> None:
    descriptors = kinds_at_rest(web)

    assert re.search(r"event=resumed .* version=9\.8\.7", upgrade(web))

    assert waiting.running.wait() == 100
    said = "socketprotectorctl: the upgrade check was called off, because an upgrade has begun"
    assert waiting.running.err.seen == [said]
    reaped(web, waiting.pid)
    no_more_open(descriptors, web.pid)
    web.stop()


@pytest.mark.costly
def test_a_check_whose_client_has_gone_ends_and_leaves_nothing(
    web: Protector, place: Path, waiting: Waiting
) -> None:
    waiting.running.end()
    os.kill(waiting.pid, signal.SIGKILL)
    reaped(web, waiting.pid)

    with Line(place) as line:
        assert line.status()["phase"] == "serving"
    web.stop()


@pytest.mark.costly
def test_a_check_whose_client_has_gone_gives_way_to_the_next(
    web: Protector, installation: Installation, place: Path, waiting: Waiting
) -> None:
    descriptors = kinds_at_rest(web)
    waiting.running.end()
    installation.script("two", "from socketprotector.__main__ import main\nmain()\n")

    with Line(place) as line:
        # Without the next check, the first check would end after TRIAL_S.
        eventually(lambda: checked(line), "an answer of the second check", TRIAL_S / 3)
    reaped(web, waiting.pid)
    no_more_open(descriptors, web.pid)
    web.stop()


def checked(line: Line) -> bool:
    """Whether a check is answered: the protector may not know yet that the client has gone."""
    line.send("upgrade", check=True)
    answer = line.answer()
    return bool(answer["ok"] and answer["result"]["reason"] is None)


@pytest.mark.costly
def test_a_stop_ends_a_check(web: Protector, waiting: Waiting) -> None:
    web.signal(signal.SIGTERM)
    assert web.process.wait(DEADLINE_S) == 0
    assert waiting.running.wait() == 1
