"""A deployer, or the workers' user, against the users that start their release.

Such a user leads the paths of `--env-file` and `--chdir` elsewhere, between reloads or meanwhile.
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import any_users_python
from tests.procfs import environment_of
from tests.scenarios.users import A, B, Command

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]

SWAPS = """if True:
    import ctypes, sys
    one, other = (each.encode() for each in sys.argv[1:])
    libc = ctypes.CDLL(None)
    print(flush=True)
    while True:
        libc.renameat2(-100, one, -100, other, 2)  # RENAME_EXCHANGE
"""


def owned(path: Path, user: str, mode: int) -> Path:
    os.chown(path, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid, follow_symlinks=False)
    path.chmod(mode)
    return path


@pytest.fixture
def theirs(command: Command) -> Path:
    """A folder of the workers' user, with an env file."""
    folder = command.start.folder / "theirs.sh"
    folder.mkdir()
    (folder / ".env").write_text("GREETING=hello\n")
    owned(folder / ".env", B, 0o600)
    return owned(folder, B, 0o755)


@pytest.fixture(params=["root", A])
def secret(command: Command, request: pytest.FixtureRequest) -> Path:
    """A file that the workers' user may not read."""
    made = command.start.folder / "secret.sh"
    made.write_text("SECRET=hunter2\n")
    return owned(made, request.param, 0o600)


def up(command: Command, *words: str | Path) -> None:
    users = ("--user", A, "--worker-user", B)
    command.up(*users, *words, "unix:s", "--", *command.worker("minimal"))


def reloaded(command: Command) -> bool:
    """Reload; return whether that succeeded."""
    pattern = r"event=(reloaded|reload-failed)\b"
    before = len(re.findall(pattern, command.start.log))
    command.start.send(signal.SIGHUP)
    command.start.wait_for(rf"(?s)(?:{pattern}.*){{{before + 1}}}")
    return bool(re.findall(pattern, command.start.log)[-1] == "reloaded")


def link(path: Path, target: Path | str) -> None:
    new = path.with_name("new")
    new.symlink_to(target)
    new.rename(path)


def test_an_env_file_that_became_a_link_is_read_with_the_workers_rights(
    command: Command, theirs: Path, secret: Path
) -> None:
    up(command, "--env-file", theirs / ".env")
    assert environment_of(command.worker_pid())["GREETING"] == "hello"

    link(theirs / ".env", secret)

    assert not reloaded(command)
    assert "Permission denied" in command.start.log
    assert "SECRET" not in environment_of(command.worker_pid())
    command.start.stop()


@pytest.mark.parametrize("users", [("--user", A), ("--user", A, "--worker-user", B)])
def test_a_link_to_a_file_of_roots_is_no_env_file_at_the_start(
    command: Command, theirs: Path, users: tuple[str, ...]
) -> None:
    secret = command.start.folder / "secret.sh"
    secret.write_text("hunter2\n")  # no NAME=VALUE: an error would name its line
    owned(secret, "root", 0o600)
    link(theirs / ".env", secret)

    words = ("--env-file", str(theirs / ".env"), "unix:s", "--", *command.worker("minimal"))
    ended = command.run(*users, *words)

    assert ended.status == 2
    assert "cannot read it" in ended.err
    assert command.start.left() == []


def test_the_protectors_own_environment_is_no_env_file(command: Command, theirs: Path) -> None:
    up(command, "--env-file", theirs / ".env")

    link(theirs / ".env", "/proc/self/environ")

    assert not reloaded(command)
    assert ".env: Permission denied" in command.start.log
    command.start.stop()


def test_a_folder_that_became_a_link_is_entered_with_the_workers_rights(
    command: Command, theirs: Path
) -> None:
    closed = command.start.folder / "closed.sh"
    closed.mkdir()
    owned(closed, A, 0o700)
    (theirs / "r1").mkdir()
    link(theirs / "live", "r1")
    up(command, "--chdir", theirs / "live")
    assert Path(os.readlink(f"/proc/{command.worker_pid()}/cwd")) == theirs / "r1"

    link(theirs / "live", closed)

    assert not reloaded(command)
    assert f"{closed}: Permission denied" in command.start.log
    command.start.stop()


def test_links_that_the_workers_user_may_follow_are_followed(
    command: Command, theirs: Path
) -> None:
    """As Capistrano's: the release links to a file that all releases share."""
    shared = theirs / "shared"
    shared.mkdir()
    (theirs / ".env").rename(shared / ".env")
    (theirs / "r1").mkdir()
    link(theirs / "r1" / ".env", "../shared/.env")
    link(theirs / "live", "r1")

    up(command, "--chdir", theirs / "live", "--env-file", theirs / "live" / ".env")

    assert environment_of(command.worker_pid())["GREETING"] == "hello"
    assert reloaded(command)
    command.start.stop()


def test_a_file_of_the_protectors_user_stays_closed_to_workers(command: Command) -> None:
    """Its folder belongs to that user or root, so no other user can lead the path elsewhere."""
    file = command.start.folder / "env.sh"
    file.write_text("TOKEN=hunter2\n")
    owned(file, A, 0o600)

    up(command, "--env-file", file)

    assert environment_of(command.worker_pid())["TOKEN"] == "hunter2"
    assert reloaded(command)
    command.start.stop()


@contextmanager
def swapped(one: Path, other: Path) -> Iterator[None]:
    """Exchange two files as the workers' user, all the time."""
    user = pwd.getpwnam(B)
    with subprocess.Popen(
        [any_users_python()[0], "-I", "-c", SWAPS, str(one), str(other)],
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def test_no_moment_is_right_to_exchange_the_file_for_a_link(
    command: Command, theirs: Path, secret: Path
) -> None:
    up(command, "--env-file", theirs / ".env")
    (theirs / "other").symlink_to(secret)

    with swapped(theirs / ".env", theirs / "other"):
        for _ in range(8):
            reloaded(command)
            assert "SECRET" not in environment_of(command.worker_pid())
    command.start.stop()
