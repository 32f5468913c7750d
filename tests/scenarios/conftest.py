"""Fixtures of the scenarios."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import any_users_python
from tests.running import (
    Protector,
)
from tests.scenarios.adopting import Installation
from tests.scenarios.earlier import Earlier
from tests.scenarios.faults import Disk
from tests.scenarios.managers import Service
from tests.scenarios.operating import MANY, Operated, Operating
from tests.scenarios.output import Syslog
from tests.scenarios.probed import Asked
from tests.scenarios.starting import Start
from tests.scenarios.tools import Gate, Release
from tests.scenarios.users import A, Command


@pytest.fixture
def start(
    tmp_path: Path, marked_environment: dict[str, str], handed_over: tuple[str, ...]
) -> Iterator[Start]:
    """Run the command detached, in a folder of its own; its end is seen to."""
    starter = Start(tmp_path, marked_environment, handed_over)
    yield starter
    starter.end()
    print(f"--- {starter.log_file} ---\n{starter.log}")


@pytest.fixture
def installation(
    tmp_path_factory: pytest.TempPathFactory,
    marked_environment: dict[str, str],
    handed_over: tuple[str, ...],
) -> Iterator[Installation]:
    """Releases of the protector itself, in folders of their own behind a symlink."""
    folder = tmp_path_factory.mktemp("installation")
    made = Installation(folder, marked_environment, handed_over)
    yield made
    made.end()


@pytest.fixture
def place() -> Path:
    """Where the control socket is to be."""
    return Path(os.environ["XDG_RUNTIME_DIR"]) / "control"


@pytest.fixture
def operated(protector: Callable[..., Protector], place: Path) -> Iterator[Operating]:
    """Start a protector that is spoken with: operated(*options, command=...)."""
    started: list[Operated] = []

    def start(
        *options: str | Path, command: tuple[str, ...] = MANY, ready: bool = True
    ) -> Operated:
        words = ("--control", place, *options, "127.0.0.1:0", "--", *command)
        started.append(Operated(protector(*words), place))
        if ready:
            started[-1].line()
            started[-1].until("phase", "serving")
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def service(
    tmp_path: Path, marked_environment: dict[str, str], handed_over: tuple[str, ...]
) -> Iterator[Service]:
    made = Service(tmp_path, marked_environment, handed_over)
    yield made
    made.close()


@pytest.fixture
def syslog(start: Start) -> Iterator[Syslog]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        needs.skip("root" if not needs.IS_ROOT else "unshare")
    listener = Syslog(start.folder)
    yield listener
    start.end()
    listener.close()


@pytest.fixture(scope="module")
def python() -> tuple[str, str]:
    """A Python that any user can execute, and the PYTHONPATH with which it runs the command."""
    return any_users_python()


@pytest.fixture
def command(start: Start, python: tuple[str, str]) -> Iterator[Command]:
    """Its folder is A's, and any user may look into it."""
    with tempfile.TemporaryDirectory(prefix="socketprotector-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.chown(folder, pwd.getpwnam(A).pw_uid, -1)
        start.folder = folder
        start.pid_file = folder / "pid"
        start.log_file = folder / "log"
        yield Command(start, python)
        start.end()
        print(start.log)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "release")


@pytest.fixture
def asked(tmp_path: Path, release: Release) -> Asked:
    return Asked(tmp_path, release)


@pytest.fixture
def new_disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        needs.skip("root" if not needs.IS_ROOT else "nsenter, unshare")
    with ExitStack() as stack:

        def make(size: str) -> Disk:
            disk = Disk(tmp_path / "disk.sh", size)
            stack.callback(disk.close)
            if not disk.mounted:
                needs.skip("mounts")
            return disk

        yield make


@pytest.fixture
def on_disk(marked_environment: dict[str, str]) -> Iterator[Callable[..., Protector]]:
    """Start the real command in the foreground where it sees a disk: on_disk(disk, ...)."""
    with ExitStack() as stack:

        def start(disk: Disk, *arguments: str | Path) -> Protector:
            words = [str(each) for each in arguments]
            daemon = Protector(words, marked_environment, through=disk.before)
            stack.callback(lambda: print(daemon.log.text()))
            stack.callback(daemon.end)
            return daemon

        yield start


@pytest.fixture
def earlier(
    tmp_path: Path,
    extracted: Path,
    marked_environment: dict[str, str],
    handed_over: tuple[str, ...],
) -> Iterator[Earlier]:
    """Protectors of an earlier commit's code, which the test's module extracts."""
    made = Earlier(tmp_path, extracted, marked_environment, handed_over)
    yield made
    for each in made.started:
        each.end()
        print(f"--- log of protector {each.pid} ---\n{each.log.text()}")
