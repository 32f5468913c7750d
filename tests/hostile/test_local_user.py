"""A local user of no group of ours, on all that a running instance and the exporter have made.

What there is is found by looking at it: a new file, socket or process is tried, too, and what this
user may do there is in `stranger.MAY`.  (Names of notify sockets cannot be found:
tests/scenarios/test_notify.py.)
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.hostile import local_user
from tests.hostile.attacked import Attacked
from tests.hostile.stranger import made_by, own_folder, too_much, tried
from tests.namespaces import STRANGER
from tests.running import eventually
from tests.unit.exporter.conftest import Exporter

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]

Facts = dict[str, tuple[int, ...]]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the stranger's."""
    return own_folder(tmp_path)


def facts(paths: list[Path]) -> Facts:
    """Return what must stay of each."""
    found: Facts = {}
    for path in paths:
        of = path.lstat()
        size = of.st_size if stat.S_ISREG(of.st_mode) and path.name != "log" else 0
        found[str(path)] = (of.st_ino, of.st_mode, of.st_uid, of.st_gid, of.st_nlink, size)
    return found


def test_nothing_that_an_instance_makes_can_be_used_against_it(
    attacked: Attacked, exporter: Callable[..., Exporter], own: Path
) -> None:
    one = attacked.up("--guard")
    page = exporter("--web", f"{one.control.parent}/page", "--agent", "127.0.0.1:0")
    assert page.page
    paths, pids = made_by(one), [*one.processes(), page.process.pid]
    before, names = facts(paths), {path.name for path in paths}
    assert {"pid", "log", "s", one.control.name, "page"} <= names, "the tool sees what there is"

    with tried(paths, pids, own) as done:
        assert too_much(done) == set()
        assert ("connect", one.socket) in done, "the positive control"
        assert facts(made_by(one)) == before
        # All of this beside its locks.
        with one.unharmed(page.process.pid):
            one.serves()
            one.works()
        protector = one.protector
        os.kill(protector, signal.SIGKILL)
        one.start.wait_for("event=resumed")
        eventually(lambda: one.protector not in (protector, one.start.pid), "another one")
        one.is_listed()
        one.start.stop()
        assert {*one.start.folder.iterdir()} == {one.start.log_file, one.release.path}


def test_the_stranger_can_do_all_of_it_where_it_may(own: Path) -> None:
    """The positive control of the tool: each act succeeds on something of its own."""
    with (
        socket.socket(socket.AF_UNIX) as one,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as two,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("")  # the kernel chooses the name
        abstract.listen()
        for kind, name in ((one, "stream"), (two, "datagram")):
            kind.bind(str(own / name))
        one.listen()
        for name in ("file", "other", "third"):
            (own / name).touch()
        (own / "folder").mkdir()
        for each in own.iterdir():
            os.chown(each, STRANGER, STRANGER)
        paths = sorted(each for each in own.iterdir())
        with subprocess.Popen(
            ["sleep", "60"],
            user=STRANGER,
            group=STRANGER,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[abstract.fileno()],
        ) as process:
            with tried(paths, [process.pid], own) as done:
                name = "@" + abstract.getsockname()[1:].decode()
                assert ("connect", name) in done
                missing = {*local_user.ACTS, *local_user.TO_PROCESSES} - {act for act, _ in done}
            process.kill()
    assert missing <= {"connect packets", "set an attribute"}, "which not every kernel has here"
