"""Between this code and the release before: upgraded and downgraded under load, both ways.

The release workflow runs this.  docs/compatibility.md promises it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.earlier import NoSuchCommit, release_before, resolve
from socketprotector import __version__
from tests import needs
from tests.answers import SCHEMA, lost
from tests.c.building import shared_folder
from tests.load import Load
from tests.rounds import rounds
from tests.running import Client, Protector
from tests.scenarios.adopting import at_rest, kill_protector, revived, served, upgrade
from tests.scenarios.earlier import Earlier, extracted_once, killed, upgraded
from tests.scenarios.tools import EITHER_HANDOFF, library_worker, pid_in, worker

MANY = worker("many")


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        commit = resolve(release_before())
    except NoSuchCommit as error:
        needs.skip("a git history with the release before", error)
    return extracted_once(commit, shared_folder(tmp_path_factory))


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
