"""This version meets a later one, in state, worker protocol and control protocol.

The later one is a copy of this code with a raised number or with something more.  The table is in
docs/compatibility.md.  The version before: test_release_before.py and test_upgrade_from.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from socketprotector import __version__
from socketprotector.model.codec import FORMAT
from tests.copies import copy_package
from tests.load import Load
from tests.running import ROOT, Client, Ended, Protector
from tests.scenarios.adopting import Installation, kill_protector, served, upgrade
from tests.scenarios.earlier import ctl_of
from tests.scenarios.operating import Line
from tests.scenarios.tools import library_worker, worker

MANY = worker("many")
LATER = "9.8.7"


@pytest.fixture
def later(installation: Installation) -> Installation:
    """With a later version, `two`, beside this one."""
    installation.add("two", version=LATER)
    return installation


def ctl(installation: Installation, name: str, *words: str) -> Ended:
    """Run the socketprotectorctl of a release."""
    return ctl_of(installation.folder / name, *words)


def resumed_as(daemon: Protector, version: str) -> None:
    assert re.search(rf"event=resumed .*version={re.escape(version)}( |$)", upgrade(daemon))


# -- the state -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [FORMAT - 1, FORMAT + 1])
def test_after_a_kill_clients_wait_for_files_that_read_the_format(
    later: Installation, form: int, tmp_path: Path
) -> None:
    """A package with another format came, up or down; no upgrade to it would have begun."""
    options = ("--guard", "--pid-file", tmp_path / "pid")
    daemon = later.start(*options, "127.0.0.1:0", "--", *MANY).ready()
    later.change("two", "model/codec", f"FORMAT = {FORMAT}", f"FORMAT = {form}")
    later.switch("two")

    mark = kill_protector(daemon)
    daemon.log.wait_for(rf'event=protector-died .*error=".*\(format {FORMAT}, ', after=mark)
    with Client(("127.0.0.1", daemon.port), "hello") as client:
        later.switch("one")
        assert client.hear()
    daemon.log.wait_for("event=resumed", after=mark)
    daemon.reload()
    daemon.stop()


def test_what_a_later_version_adds_to_the_state_survives_no_downgrade_and_harms_none(
    later: Installation,
) -> None:
    added = "    later: tuple[int, ...] = (1, 2)\n    left_out: tuple[str, ...] = ()"
    later.change("two", "core/snapshot", r"    left_out: tuple\[str, \.\.\.\] = \(\)", added)
    later.switch("two")
    daemon = later.start("--workers", "2", "127.0.0.1:0", "--", *MANY).ready()

    with Load(f"127.0.0.1:{daemon.port}") as load:
        for name, version in (("one", __version__), ("two", LATER), ("one", __version__)):
            served(load)
            later.switch(name)
            resumed_as(daemon, version)
            served(load)
            daemon.reload()
    daemon.stop()

    assert load.snapshot().failures == ()


# -- the worker protocol -------------------------------------------------------------------


def test_what_a_later_client_library_says_is_passed_over(
    installation: Installation, place: Path, tmp_path: Path
) -> None:
    library = tmp_path / "later" / "socketprotector_client"
    copy_package(ROOT / "client_lib" / "socketprotector_client", library)
    module = library / "worker.py"
    more = 'notify("X_SOCKETPROTECTOR_LATER=1", "LATER=x", "STATUS=later", "READY=1", '
    text, count = re.subn(r'notify\("READY=1", ', more, module.read_text())
    assert count == 1
    module.unlink()  # a link to a file of all copies
    module.write_text(text)
    installation.environment = {**installation.environment, "PYTHONPATH": str(library.parent)}
    options = ("--control", place)
    command = library_worker("echo")
    daemon = installation.start(*options, "127.0.0.1:0", "--", *command).ready()

    with Load(f"127.0.0.1:{daemon.port}") as load:
        served(load)
        resumed_as(daemon, __version__)
        served(load)
        daemon.reload()
        served(load)
    with Line(place) as line:
        workers = line.status()["generations"][-1]["workers"]
    daemon.stop()

    assert [each["status"] for each in workers] == ["later"]
    assert load.snapshot().failures == ()


# -- the control protocol ------------------------------------------------------------------


@pytest.fixture
def web(later: Installation, place: Path) -> Protector:
    return later.start("--control", place, "--name", "web", "127.0.0.1:0", "--", *MANY).ready()


def test_a_later_socketprotectorctl_is_told_which_version_is_spoken(
    web: Protector, later: Installation, place: Path
) -> None:
    later.change("two", "ctl/client", "VERSION = 1", "VERSION = 2")

    said = ctl(later, "two", "--control", str(place), "status")

    assert (said.status, said.out) == (2, ""), said
    assert said.lines == ["socketprotectorctl: v: this protector speaks version 1"]
    web.reload()
    web.stop()


def test_so_is_this_one_by_a_later_protector(
    web: Protector, later: Installation, place: Path
) -> None:
    later.change("two", "model/control_requests", "VERSION = 1", "VERSION = 2")
    later.switch("two")
    resumed_as(web, LATER)

    said = ctl(later, "one", "--control", str(place), "status")

    assert (said.status, said.out) == (2, ""), said
    assert said.lines == ["socketprotectorctl: v: this protector speaks version 2"]
    later.switch("one")
    resumed_as(web, __version__)
    assert ctl(later, "one", "--control", str(place), "status").status == 0
    web.stop()


def test_what_a_later_protector_adds_to_answers_and_events_is_passed_over(
    web: Protector, later: Installation, place: Path
) -> None:
    later.change(
        "two", "model/control_requests", "_line\\({\\*\\*fields,", '_line({**fields, "later": [1],'
    )
    later.change(
        "two", "daemon/control/commands", '"now": time', '"later": {"a": [None]}, "now": time'
    )
    later.switch("two")
    resumed_as(web, LATER)

    shown = ctl(later, "one", "--control", str(place), "status", "--json")
    done = ctl(later, "one", "--control", str(place), "reload")

    assert (shown.status, json.loads(shown.out)["later"]) == (0, {"a": [None]}), shown
    assert done.status == 0, done
    assert "switched: new connections go to generation 2" in done.err
    web.stop()
