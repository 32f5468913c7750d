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
from typing import IO

import pytest

from tests import needs
from tests.namespaces import any_users_python
from tests.procfs import children_of, environment_of
from tests.running import eventually
from tests.scenarios.users import A, B, Command

pytestmark = [needs.ANOTHER_USER, pytest.mark.timeout(120)]

DEPLOYER = "daemon"

SWAPS = """if True:
    import ctypes, sys
    one, other = (each.encode() for each in sys.argv[1:])
    libc = ctypes.CDLL(None)
    print(flush=True)
    while True:
        libc.renameat2(-100, one, -100, other, 2)  # RENAME_EXCHANGE
"""

#: Stops each child of a process that has become this user, but not yet executed its program.
STOPS = """if True:
    import os, signal, sys
    children = open("/proc/{0}/task/{0}/children".format(sys.argv[1]))
    print("watching", flush=True)
    while True:
        children.seek(0)
        for pid in map(int, children.read().split()):
            try:
                os.kill(pid, signal.SIGSTOP)
                os.readlink(f"/proc/{pid}/exe")
                os.kill(pid, signal.SIGCONT)
            except PermissionError as error:
                if error.filename:
                    print("stopped", flush=True)
            except OSError:
                pass
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

    def verdicts() -> list[str]:
        return re.findall(r"event=(reloaded|reload-failed)\b", command.start.log)

    before = len(verdicts())
    command.start.send(signal.SIGHUP)
    eventually(lambda: len(verdicts()) > before, "the verdict of a reload")
    return verdicts()[-1] == "reloaded"


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


@pytest.mark.parametrize("name", ["sp.settings", "sp.state"])
def test_what_the_protector_has_open_is_no_env_file(
    command: Command, theirs: Path, name: str
) -> None:
    up(command, "--env-file", theirs / ".env")
    opened = Path(f"/proc/{command.protector}/fd")
    [fd] = [each.name for each in opened.iterdir() if f":{name} " in os.readlink(each)]

    link(theirs / ".env", f"/proc/self/fd/{fd}")

    assert not reloaded(command)
    assert ".env: No such file" in command.start.log
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


@pytest.mark.parametrize("what", ["folder", "command"])
def test_a_link_that_only_the_protector_can_read_leads_no_worker_anywhere(
    command: Command, theirs: Path, what: str
) -> None:
    """Otherwise the worker would learn where such a link leads."""
    target = theirs / "target"
    target.mkdir()
    python, *words = command.worker("minimal")
    (target / "python").symlink_to(python)
    closed = command.start.folder / "closed.sh"
    closed.mkdir()
    (closed / "link").symlink_to(target)
    owned(closed, A, 0o700)
    link(theirs / "live", target)
    program = theirs / "live" / "python" if what == "command" else python
    folder = theirs / "live" if what == "folder" else theirs
    users = ("--user", A, "--worker-user", B)
    command.up(*users, "--chdir", folder, "unix:s", "--", program, *words)

    link(theirs / "live", closed / "link")

    assert not reloaded(command)
    assert "Permission denied" in command.start.log
    command.start.stop()


def test_no_moment_is_right_to_exchange_the_folder_for_a_link(
    command: Command, theirs: Path
) -> None:
    closed = command.start.folder / "closed.sh"
    closed.mkdir()
    owned(closed, A, 0o700)
    (theirs / "live").mkdir()
    up(command, "--chdir", theirs / "live")
    (theirs / "other").symlink_to(closed)

    with running_as_worker(SWAPS, theirs / "live", theirs / "other"):
        for _ in range(8):
            reloaded(command)
            assert os.readlink(f"/proc/{command.worker_pid()}/cwd") != str(closed)
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
def running_as_worker(program: str, *words: object) -> Iterator[IO[bytes]]:
    """Run a Python program as the workers' user; yield its output after the first line."""
    user = pwd.getpwnam(B)
    with subprocess.Popen(
        [any_users_python()[0], "-I", "-c", program, *map(str, words)],
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.stdout
        finally:
            process.kill()


def test_no_moment_is_right_to_exchange_the_file_for_a_link(
    command: Command, theirs: Path, secret: Path
) -> None:
    up(command, "--env-file", theirs / ".env")
    (theirs / "other").symlink_to(secret)

    with running_as_worker(SWAPS, theirs / ".env", theirs / "other"):
        for _ in range(8):
            reloaded(command)
            assert "SECRET" not in environment_of(command.worker_pid())
    command.start.stop()


def test_the_workers_user_cannot_stop_the_protector_by_stopping_a_new_worker(
    command: Command,
) -> None:
    """Before its exec the worker is a child for whose answer the protector waits."""
    up(command, "--start-timeout", "5s")

    with running_as_worker(STOPS, command.protector):
        all(reloaded(command) for _ in range(20))  # until one is stopped at the right moment

    for pid in children_of(command.protector):  # the last one may still be stopped
        os.kill(pid, signal.SIGCONT)
    assert reloaded(command)
    command.start.stop()


# -- a deployer's release ------------------------------------------------------


class Deployed:
    """A release of a deployer, in which a daemon of the workers' user starts."""

    def __init__(self, command: Command) -> None:
        self._command, folder = command, command.start.folder
        self.secret = folder / "secret.sh"
        self.secret.write_text("SECRET=hunter2\n")
        owned(self.secret, "root", 0o600)
        self.srv = folder / "srv.sh"
        self.release, self.shared = self.srv / "releases" / "1", self.srv / "shared"
        self.env = self.release / ".env"
        live = self.srv / "live"
        for each in (self.release, self.shared, live):
            each.mkdir(parents=True)
        for each in (self.srv, self.release.parent, self.release, self.shared):
            owned(each, DEPLOYER, 0o755)
        owned(live, A, 0o755)
        (live / "current").symlink_to("../releases/1")
        (self.shared / ".env").write_text("GREETING=hello\n")
        owned(self.shared / ".env", DEPLOYER, 0o644)
        self.env.symlink_to("../../shared/.env")  # as Capistrano's: all releases share the file
        self.options = (
            *("--user", A, "--worker-user", B, "--deployer", DEPLOYER),
            *("--releases", str(self.release.parent), "--current", str(live / "current")),
            *("--chdir", "{release}", "--env-file", "{release}/.env"),
            *("unix:s", "--", *command.worker("minimal")),
        )

    def becomes(self, kind: str) -> None:
        """Put something else in the place of the env file."""
        self.env.unlink()
        if kind == "FIFO":
            os.mkfifo(self.env, 0o666)
        elif kind == "endless":
            with self.env.open("wb") as file:
                file.truncate(1 << 40)
        else:
            self.env.symlink_to(self.secret if kind == "secret" else f"/dev/{kind}")


#: What is no env file, and what is said about it.
NO_ENV_FILES = {
    "secret": "Permission denied",
    "FIFO": "a FIFO, but it is read again later",
    "zero": "no regular file",
    "tty": "no regular file",
    "endless": "more than 1048576 bytes",
}


@pytest.fixture
def deployed(command: Command) -> Deployed:
    return Deployed(command)


def test_the_env_file_that_all_releases_share_is_read(command: Command, deployed: Deployed) -> None:
    command.up(*deployed.options)

    assert environment_of(command.worker_pid())["GREETING"] == "hello"
    assert reloaded(command)
    command.start.stop()


@pytest.mark.parametrize("kind", NO_ENV_FILES)
def test_a_release_reloads_with_no_other_users_env_file(
    command: Command, deployed: Deployed, kind: str
) -> None:
    command.up(*deployed.options)

    deployed.becomes(kind)

    assert not reloaded(command)
    assert NO_ENV_FILES[kind] in command.start.log
    assert "SECRET" not in environment_of(command.worker_pid())
    command.start.stop()


@pytest.mark.parametrize("kind", NO_ENV_FILES)
def test_a_release_starts_with_no_other_users_env_file(
    command: Command, deployed: Deployed, kind: str
) -> None:
    deployed.becomes(kind)

    ended = command.run(*deployed.options)

    assert ended.status == 2
    assert ("cannot read it" if kind == "secret" else NO_ENV_FILES[kind]) in ended.err


def test_a_file_of_roots_is_an_env_file_of_roots_workers(command: Command) -> None:
    file = command.start.folder / "env.sh"
    file.write_text("TOKEN=hunter2\n")
    owned(file, "root", 0o600)

    command.up("--env-file", file, "unix:s", "--", *command.worker("minimal"))

    assert environment_of(command.worker_pid())["TOKEN"] == "hunter2"
    assert reloaded(command)
    command.start.stop()
