"""Between this code and the release before: upgraded and downgraded under load, both ways.

The release workflow runs this.  docs/compatibility.md promises it.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import earlier as earlier_code
from bench.earlier import NoSuchCommit, release_before, resolve
from socketprotector import __version__
from tests import needs
from tests.answers import SCHEMA, lost
from tests.c.building import shared_folder
from tests.load import Load
from tests.rounds import rounds
from tests.running import DEADLINE_S, ROOT, Client, Protector
from tests.scenarios.adopting import at_rest, kill_protector, revived, served, upgrade
from tests.scenarios.earlier import Earlier, ctl_of, extracted_once, killed, upgraded
from tests.scenarios.tools import EITHER_HANDOFF, Gate, library_worker, pid_in, worker

MANY = worker("many")


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        commit = resolve(release_before())
    except NoSuchCommit as error:
        needs.skip("a git history with the release before", error)
    return extracted_once(commit, shared_folder(tmp_path_factory))


def test_the_release_before_is_no_pre_release(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = b"v0.10.0rc1\nv0.9.1\nv0.9.0\n"
    monkeypatch.setattr(earlier_code, "_git", lambda *_: listed)
    assert release_before() == "v0.9.1"


def downgraded(daemon: Protector, version: str) -> None:
    """Let the protector execute the code in place: that of the release before."""
    assert re.search(f"event=resumed .*version={version}( |$)", upgrade(daemon)), daemon.log.text()


def test_answers_and_events_keep_what_they_had(extracted: Path) -> None:
    """0.9.0 is the first version with a schema."""
    schema = extracted / "socketprotector" / "control.schema.json"
    if not schema.exists():
        assert __version__ == "0.9.0"
        return
    assert [*lost(json.loads(schema.read_text(encoding="utf-8")), SCHEMA)] == []


@pytest.mark.parametrize("began", ["with the release before", "with this code"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@EITHER_HANDOFF
def test_upgrades_downgrades_and_reloads_under_load_fail_no_client(
    earlier: Earlier, handoff: str, kind: str, began: str, tmp_path: Path
) -> None:
    command = library_worker("echo") if handoff == "connection" else MANY
    path = tmp_path / "s"
    listen = f"unix:{path}" if kind == "unix" else "127.0.0.1:0"
    if began == "with this code":
        earlier.replace()
    daemon = earlier.start("--workers", "2", listen, "--", *command)
    place = str(path) if kind == "unix" else ("127.0.0.1", daemon.port)

    with Load(daemon.addresses[0].removeprefix("tcp:")) as load, Client(place) as held:
        first = pid_in(held.ask())
        served(load)
        if began == "with this code":
            earlier.put_back()
            downgraded(daemon, earlier.version)
            daemon.reload()
            served(load)
        for _ in range(rounds(1, 2)):
            earlier.replace()
            upgraded(daemon)
            served(load)
            daemon.reload()
            served(load)
            earlier.put_back()
            downgraded(daemon, earlier.version)
            served(load)
            daemon.reload()
            served(load)
        assert pid_in(held.ask()) == first
    seen = load.snapshot()
    daemon.stop()

    assert seen.failures == ()
    assert seen.connections == seen.begun


@EITHER_HANDOFF
@pytest.mark.costly
def test_after_a_kill_the_guard_starts_either_code(
    earlier: Earlier, handoff: str, tmp_path: Path
) -> None:
    """A kill costs one connection at most, the undelivered one."""
    options = ("--guard", "--pid-file", tmp_path / "pid", "--workers", "2")
    daemon = earlier.start(*options, "127.0.0.1:0", "--", *MANY)
    at_rest(daemon)  # the guard knows that it has accepted

    with Load(f"127.0.0.1:{daemon.port}", concurrency=8) as load:
        served(load)
        earlier.replace()
        killed(daemon)
        served(load, 32)
        daemon.reload()
        earlier.put_back()
        mark = kill_protector(daemon)
        revived(daemon, mark)
        line = daemon.log.wait_for("event=resumed", after=mark)
        served(load, 32)
        daemon.reload()
        served(load)
    failures = load.snapshot().failures
    daemon.stop()

    assert re.search(f"version={earlier.version}( |$)", line)
    assert len(failures) <= (2 if handoff == "connection" else 0), failures
    assert {failure.kind for failure in failures} <= {"reset", "empty"}


def test_either_socketprotectorctl_operates_either_protector(
    earlier: Earlier, extracted: Path, place: Path
) -> None:
    daemon = earlier.start("--control", place, "127.0.0.1:0", "--", *MANY)

    for version in (earlier.version, __version__):
        for code in (extracted, ROOT):
            shown = ctl_of(code, "--control", str(place), "status", "--json")
            assert shown.status == 0, shown
            assert json.loads(shown.out)["version"] == version
            done = ctl_of(code, "--control", str(place), "reload")
            assert done.status == 0, done
        if version == earlier.version:
            earlier.replace()
            upgraded(daemon)
    daemon.stop()


# -- in the middle of something --------------------------------------------------------------

EITHER_WAY = pytest.mark.parametrize("way", ["up", "down"])


@pytest.fixture
def switch(earlier: Earlier, way: str) -> Callable[[Protector], None]:
    """Put in place the code to start with; return a function that switches to the other code."""
    if way == "down":
        earlier.replace()

    def to_the_other(daemon: Protector) -> None:
        if way == "down":
            earlier.put_back()
            downgraded(daemon, earlier.version)
        else:
            earlier.replace()
            upgraded(daemon)

    return to_the_other


def order(place: Path, command: str, **arguments: object) -> None:
    """Give a command that either code knows."""
    with socket.socket(socket.AF_UNIX) as line, line.makefile("rb") as answers:
        line.settimeout(DEADLINE_S)
        line.connect(str(place))
        request = {"v": 1, "id": 1, "command": command, **arguments}
        line.sendall(json.dumps(request).encode() + b"\n")
        assert json.loads(answers.readline())["ok"]


def reloaded(daemon: Protector, load: Load, mark: int) -> None:
    """Wait until generation 2 has replaced generation 1, and serves.  mark: a length of the log."""
    daemon.log.wait_for("event=reloaded generation=2", after=mark)
    daemon.log.wait_for("event=drained generation=1", after=mark)
    served(load)


@EITHER_WAY
@EITHER_HANDOFF
@pytest.mark.costly
def test_while_a_reload_starts_workers(
    earlier: Earlier, handoff: str, switch: Callable[[Protector], None], tmp_path: Path
) -> None:
    gate, second = Gate(tmp_path / "gate"), tmp_path / "second"
    script = f'test -e {second} && cat {gate.path}; exec "$@"'
    daemon = earlier.start("127.0.0.1:0", "--", "/bin/sh", "-c", script, "sh", *MANY)
    second.touch()

    with Load(f"127.0.0.1:{daemon.port}") as load:
        mark = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=spawned generation=2 ", after=mark)
        switch(daemon)
        served(load)
        gate.stay_open()
        reloaded(daemon, load, mark)
    daemon.stop()

    assert load.snapshot().failures == ()


@EITHER_WAY
@EITHER_HANDOFF
@pytest.mark.costly
def test_while_a_generation_settles(
    earlier: Earlier, handoff: str, switch: Callable[[Protector], None]
) -> None:
    daemon = earlier.start("--settle", "4s", "127.0.0.1:0", "--", *MANY)

    with Load(f"127.0.0.1:{daemon.port}") as load:
        mark = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=route generation=2", after=mark)
        switch(daemon)
        reloaded(daemon, load, mark)
    daemon.stop()

    assert load.snapshot().failures == ()


@EITHER_WAY
@EITHER_HANDOFF
@pytest.mark.costly
def test_while_a_canary_has_its_share(
    earlier: Earlier, handoff: str, switch: Callable[[Protector], None], place: Path
) -> None:
    options = ("--control", place, "--workers", "2")
    daemon = earlier.start(*options, "127.0.0.1:0", "--", *library_worker("echo"))

    with Load(f"127.0.0.1:{daemon.port}") as load:
        mark = len(daemon.log.seen)
        order(place, "reload", canary={"share": "50%", "for_s": 5})
        daemon.log.wait_for("event=route generation=1 sharing=2", after=mark)
        switch(daemon)
        served(load)
        reloaded(daemon, load, mark)
    daemon.stop()

    assert load.snapshot().failures == ()


@EITHER_WAY
@EITHER_HANDOFF
@pytest.mark.costly
def test_while_clients_are_held(
    earlier: Earlier, handoff: str, switch: Callable[[Protector], None], place: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    daemon = earlier.start("--control", place, f"unix:{path}", "--", *MANY)
    order(place, "hold", seconds=DEADLINE_S)

    with Client(str(path), "early") as held:
        switch(daemon)
        order(place, "release")
        assert pid_in(held.hear())
    daemon.reload()
    daemon.stop()
