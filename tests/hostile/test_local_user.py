"""A local user of no group of ours, on all that a running instance and the exporter have made.

What there is is found by looking at it: a new file, socket or process is tried, too, and what this
user may do there has to be added to MAY.  (Names of notify sockets cannot be found:
tests/scenarios/test_notify.py.)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import needs
from tests.hostile import local_user
from tests.hostile.attacked import Attacked
from tests.namespaces import STRANGER, any_users_python
from tests.procfs import descriptors
from tests.running import eventually
from tests.unit.exporter.conftest import Exporter

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]

LOOKS = {"read", "list", "lock"}
#: The whole of what this user may do, by the kind of file.
MAY = {
    "folder": LOOKS,
    "pid": {"read"},  # its lock is held
    "s": {"connect"},  # the service
    "notify": set[str](),
    "process": set[str](),
}
Facts = dict[str, tuple[int, ...]]


@contextmanager
def tried(paths: list[Path], pids: list[int], own: Path) -> Iterator[set[tuple[str, str]]]:
    """Have a stranger try everything; what has succeeded, while it holds what it has got."""
    code = Path(local_user.__file__)
    words = (json.dumps([*map(str, paths)]), json.dumps(pids), str(own))
    with subprocess.Popen(
        [any_users_python()[0], "-I", code, *words],
        user=STRANGER,
        group=STRANGER,
        extra_groups=[],
        start_new_session=True,  # within one, any user may send CONT
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    ) as process:
        assert process.stdout is not None
        try:
            yield {(act, str(each)) for act, each in json.loads(process.stdout.readline())}
        finally:
            process.kill()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the stranger's."""
    for each in (tmp_path, *tmp_path.parents[:-2]):
        each.chmod(each.stat().st_mode | 0o011)
    made = tmp_path / "own"
    made.mkdir()
    os.chown(made, STRANGER, STRANGER)
    return made


def made_by(one: Attacked, *others: int) -> list[Path]:
    """Return each path that the instance has made or has open, but what lies in secret folders."""
    folders = (one.start.folder, one.control.parent)
    found = {each for folder in folders for each in (folder, *folder.rglob("*"))}
    for pid in (*one.processes(), *others):
        held = {Path(target) for target in descriptors(pid).values() if target.startswith("/")}
        found |= {path for path in held if path.parent != Path("/dev") and path.exists()}
    found.discard(one.release.path)  # the test's
    return sorted(path for path in found if not path.parent.name.startswith(".notify-"))


def kind_of(path: str) -> str:
    name = os.path.basename(path)
    if not os.path.isabs(path):
        return "process"
    if name.startswith(".notify-"):
        return "notify"
    return "folder" if os.path.isdir(path) else name


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
        wrong = {each for each in done if each[0] not in MAY.get(kind_of(each[1]), set())}
        assert wrong == set()
        assert ("connect", one.socket) in done, "the positive control"
        assert facts(made_by(one)) == before
        # All of this beside its locks.
        with one.unharmed(page.process.pid):
            one.serves()
            one.works()
        protector = one.protector
        os.kill(protector, signal.SIGKILL)
        one.start.wait_for("event=adopted")
        eventually(lambda: one.protector not in (protector, one.start.pid), "another one")
        one.is_listed()
        one.start.stop()
        assert {*one.start.folder.iterdir()} == {one.start.log_file, one.release.path}


def test_the_stranger_can_do_all_of_it_where_it_may(own: Path) -> None:
    """The positive control of the tool: each act succeeds on something of its own."""
    with (
        socket.socket(socket.AF_UNIX) as one,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as two,
    ):
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
        ) as process:
            with tried(paths, [process.pid], own) as done:
                missing = {*local_user.ACTS, *local_user.TO_PROCESSES} - {act for act, _ in done}
            process.kill()
    assert missing <= {"connect packets", "set an attribute"}, "which not every kernel has here"
