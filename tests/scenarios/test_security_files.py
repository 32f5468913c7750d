"""Links, FIFOs and other users' files where ours should be: root follows none of them."""

from __future__ import annotations

import os
import pty
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.launch.bind_unix import _give
from socketprotector.launch.listen_spec import parse
from socketprotector.system import log_file
from socketprotector.system.env_file import contents
from tests import needs
from tests.namespaces import any_users_python
from tests.own_folder import let_through
from tests.running import COMMAND, ask
from tests.scenarios.starting import MINIMAL, Start
from tests.scenarios.tools import worker

needs_root = needs.ANOTHER_USER
NOBODY = pwd.getpwnam("nobody").pw_uid
PRECIOUS = "root:x:0:0\n"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of ours that no other user may change; it is as it was afterwards."""
    path = tmp_path / "victim.sh"
    path.write_text(PRECIOUS)
    path.chmod(0o644)
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_text() == PRECIOUS
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        before.st_uid,
        before.st_gid,
        before.st_mode,
    )


@pytest.fixture
def theirs(start: Start) -> Path:
    """A folder that belongs to the user nobody, where a start is to put its files."""
    folder = start.folder / "theirs.sh"
    folder.mkdir()
    os.chown(folder, NOBODY, -1)
    let_through(start.folder)
    return folder


@pytest.fixture
def shared(start: Start) -> Path:
    """A folder like /tmp."""
    folder = start.folder / "shared.sh"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def refused(start: Start, *words: str | Path, status: int = 111) -> str:
    """Start with what any user can execute, and see it refused; return the line that says so."""
    python, path = any_users_python()
    ended = start(
        *(*words, "unix:s", "--", python, *MINIMAL[1:]),
        command=(python, *COMMAND[1:]),
        environment={"PYTHONPATH": path},
    )
    assert ended.status == status, ended
    assert start.left() == []
    return ended.lines[-1]  # before it there may be a notice about the folder


@needs_root
@pytest.mark.parametrize("user", [(), ("--user", "nobody")], ids=["root", "user"])
def test_a_link_for_a_log_file_in_another_users_folder_is_refused(
    start: Start, theirs: Path, victim: Path, user: tuple[str, ...]
) -> None:
    (theirs / "log").symlink_to(victim)

    err = refused(start, *user, "--log-file", theirs / "log")

    assert "a symbolic link that users other than root may change" in err


@needs_root
def test_a_link_for_the_folder_of_the_log_is_refused(
    start: Start, theirs: Path, victim: Path
) -> None:
    (theirs / "logs").symlink_to(victim.parent)

    for name in (victim.name, "new"):
        err = refused(start, "--log-file", theirs / "logs" / name)
        assert "a symbolic link that users other than root may change" in err
    assert not (victim.parent / "new").exists(), "nothing is made there either"


@needs_root
def test_a_second_name_of_another_file_is_no_log_file(
    start: Start, theirs: Path, victim: Path
) -> None:
    (theirs / "log").hardlink_to(victim)

    err = refused(start, "--log-file", theirs / "log")

    assert "it has another name (a hard link)" in err


@needs_root
def test_such_a_file_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open it alone may have an effect: it may be a device, or a FIFO with a reader."""
    theirs, log = tmp_path / "theirs", tmp_path / "theirs" / "log"
    theirs.mkdir()
    shutil.chown(theirs, "nobody")
    log.touch()
    opened: list[str] = []
    real = os.open

    def opens(path: str, flags: int, *more: int, **named: int) -> int:
        opened.append(path)
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", opens)

    os.close(log_file.open_log(str(log)))
    assert opened.count("log") > 0, "the positive control"

    opened.clear()
    os.link(log, tmp_path / "second")
    with pytest.raises(PermissionError, match="hard link"):
        log_file.open_log(str(log))
    assert "log" not in opened


@needs_root
def test_another_users_file_in_a_shared_folder_is_no_log_file(start: Start, shared: Path) -> None:
    log = shared / "log"
    log.touch()
    os.chown(log, NOBODY, -1)

    err = refused(start, "--log-file", log)

    # The system may say so itself (the sysctl fs.protected_regular).
    assert "owns it" in err or "Permission denied" in err
    assert log.read_text() == ""


def test_a_link_that_only_we_can_have_made_is_followed(start: Start) -> None:
    """Operators do that: /var/log/x -> /data/log/x."""
    real = start.folder / "real.sh"
    real.touch()
    (start.folder / "log").symlink_to(real)

    start.up("unix:s", "--", *MINIMAL)

    assert ask(f"{start.folder}/s") == "hello"
    assert "event=ready" in real.read_text()
    start.stop()


def test_a_link_of_ours_for_the_folder_of_a_log_that_is_yet_to_be_made_is_followed(
    tmp_path: Path,
) -> None:
    """The first start after an operator has moved the logs to another disk."""
    (tmp_path / "real").mkdir(0o755)
    (tmp_path / "logs").symlink_to(tmp_path / "real")

    os.close(log_file.open_log(str(tmp_path / "logs" / "log")))

    assert (tmp_path / "real" / "log").read_text() == ""


@pytest.mark.parametrize("folder", ["mine", "theirs.sh"])
def test_a_fifo_without_a_reader_does_not_hold_the_start_up(start: Start, folder: str) -> None:
    log = start.folder / ("fifo.sh" if folder == "mine" else f"{folder}/fifo")
    if folder != "mine":
        log.parent.mkdir()
        if os.geteuid() == 0:
            os.chown(log.parent, NOBODY, -1)
    os.mkfifo(log)

    line = refused(start, "--log-file", log)
    assert "no process reads that FIFO; choose a regular file, or for a FIFO start its" in line


@needs_root
def test_a_link_that_comes_before_the_log_is_reopened_is_refused(
    start: Start, theirs: Path, victim: Path
) -> None:
    start.log_file = theirs / "log"
    start.up("unix:s", "--", *MINIMAL)
    start.log_file.rename(theirs / "log.1")
    (theirs / "log").symlink_to(victim)
    start.log_file = theirs / "log.1"

    start.send(signal.SIGUSR1)

    start.wait_for("event=reopen-failed")
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()


@needs_root
def test_what_a_failed_worker_said_is_not_read_from_another_file(
    start: Start, theirs: Path, victim: Path
) -> None:
    """The name of the log may lead elsewhere by then."""
    start.log_file = theirs / "log"
    swap = f"mv {theirs}/log {theirs}/log.1; ln -s {victim} {theirs}/log; exit 3"

    ended = start(
        *("--log-file", theirs / "log", "--start-tries", "1"),
        *("unix:s", "--", "/bin/sh", "-c", swap),
    )

    assert ended.status == 3
    assert PRECIOUS.strip() not in ended.err


# -- the pid file --------------------------------------------------------------


@needs_root
def test_a_pid_file_in_a_shared_folder_goes_around_what_others_have_put_there(
    start: Start, shared: Path, victim: Path
) -> None:
    """The name of the temporary file can be guessed: what is there is replaced, not written to."""
    start.pid_file = shared / "pid"
    script = (
        "import os, sys\n"
        f"os.symlink({str(victim)!r}, {str(shared / 'pid')!r} + f'.{{os.getpid()}}')\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    before = (sys.executable, "-c", script)

    with start.popen(
        "--pid-file", start.pid_file, "-f", "unix:s", "--", *MINIMAL, before=before
    ) as p:
        assert p.stderr is not None
        for line in p.stderr:
            if "event=ready" in line:
                break
        assert start.pid == p.pid
        p.terminate()
    assert list(shared.iterdir()) == []


@needs_root
def test_a_link_for_a_pid_file_is_refused(start: Start, theirs: Path, victim: Path) -> None:
    start.pid_file = theirs / "pid"
    start.pid_file.symlink_to(victim)

    err = refused(start, status=2)

    assert f"the pid file {start.pid_file} is a symbolic link" in err
    start.pid_file.unlink()


# -- UNIX sockets --------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_for_a_socket_is_neither_followed_nor_replaced(
    start: Start, theirs: Path, victim: Path, exists: bool
) -> None:
    target = victim if exists else victim.with_name("new")
    (theirs / "s").symlink_to(target)

    ended = start(f"unix:{theirs}/s?user=nobody&mode=0666", "--", *MINIMAL)

    assert ended.status == 111
    assert (theirs / "s").is_symlink()
    assert not victim.with_name("new").exists()


@needs_root
@pytest.mark.parametrize("kind", ["file", "link", "hard link", "another socket of root"])
def test_what_was_put_in_the_place_of_a_socket_is_not_given_away(
    tmp_path: Path, victim: Path, kind: str
) -> None:
    """Between bind() and chown()."""
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("")
    elif kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)

    with socket.socket(socket.AF_UNIX) as ours, socket.socket(socket.AF_UNIX) as other:
        ours.bind(str(tmp_path / "ours"))
        if kind == "another socket of root":
            other.bind(str(path))
        with pytest.raises(OSError, match=r"owns (it|the file there)"):
            _give(ours, str(path), parse(f"unix:{path}?user=nobody", "/"))

    assert path.lstat().st_uid == 0


def test_a_socket_of_ours_is_given_away(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        user = pwd.getpwuid(os.getuid()).pw_name

        found = _give(sock, str(path), parse(f"unix:{path}?user={user}", "/"))

    assert found.st_ino == path.lstat().st_ino


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_with_the_name_of_one_of_its_sockets_stops_no_start(start: Start, kind: str) -> None:
    """In a folder such as /tmp, any user can make one, and only that user can remove it."""
    other = start.folder / ".s.sp-000001"
    match kind:
        case "file":
            other.touch()
        case "folder":
            other.mkdir()
        case _:
            other.symlink_to("nowhere")

    ended = start(
        *("--log-file", start.log_file, "--handoff", "listener", "--ready", "notify"),
        *(f"unix:{start.folder}/s", "--", *worker("accepts")),
    )

    assert ended.status == 0, ended.err
    assert ask(f"{start.folder}/s", "hello").endswith("hello")
    assert os.path.lexists(other)
    start.stop()
    other.rmdir() if kind == "folder" else other.unlink()


@needs_root
def test_a_dead_socket_of_another_user_with_such_a_name_stops_no_users_start(
    start: Start, theirs: Path, shared: Path
) -> None:
    """In a folder such as /tmp, only its owner and root can remove it."""
    python, path = any_users_python()
    other = shared / ".s.sp-000001"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(other))
    start.pid_file, start.log_file = theirs / "pid", theirs / "log"

    ended = start(
        *("--log-file", start.log_file, "--handoff", "listener", "--ready", "notify"),
        *(f"unix:{shared}/s", "--", python, *worker("accepts")[1:]),
        command=(python, *COMMAND[1:]),
        environment={"PYTHONPATH": path},
        user=NOBODY,
    )

    assert ended.status == 0, ended.err
    assert ask(f"{shared}/s", "hello").endswith("hello")
    assert other.exists()
    start.stop()


@needs_root
def test_root_does_not_read_a_servers_files_that_the_workers_cannot_read(
    start: Start, theirs: Path
) -> None:
    """A link may lead to any file of root; what was found there would show in a notice."""
    secret, server = start.folder / "secret.sh", theirs / "gunicorn"
    secret.write_text("socketprotector_client")
    secret.chmod(0o600)
    (theirs / "conf.py").symlink_to(secret)
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    words = ("--check", "--chdir", theirs, f"unix:{theirs}/s", "--", server, "-cconf.py")

    assert "client library" not in start(*words).err
    assert "only with the client library" in start("--user", "nobody", *words).err


@needs_root
def test_a_script_whose_interpreter_is_a_fifo_does_not_hold_a_start_up(
    start: Start, theirs: Path
) -> None:
    """Nor is another special file opened, which could have an effect."""
    fifo, script = theirs / "fifo", theirs / "script"
    os.mkfifo(fifo, 0o777)
    script.write_text(f"#!{fifo}\n")
    script.chmod(0o755)

    ended = start(
        "--log-file", start.log_file, "--user", "nobody", f"unix:{theirs}/s", "--", script
    )

    assert ended.status != 0
    assert "Permission denied" in ended.err


# -- the env file --------------------------------------------------------------


def test_an_env_file_that_became_a_fifo_does_not_hold_a_reload_up(start: Start) -> None:
    file = start.folder / "env.sh"
    file.write_text("A=1\n")
    start.up("--env-file", str(file), "unix:s", "--", *MINIMAL)
    file.unlink()
    os.mkfifo(file)

    start.send(signal.SIGHUP)

    start.wait_for("event=reload-failed .*a FIFO, but it is read again later")
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()


def test_an_env_file_that_became_a_terminal_ends_no_protector(start: Start) -> None:
    file = start.folder / "env.sh"
    file.write_text("A=1\n")
    start.up("--env-file", str(file), "unix:s", "--", *MINIMAL)
    ours, theirs = pty.openpty()
    file.unlink()
    file.symlink_to(os.ttyname(theirs))

    start.send(signal.SIGHUP)

    start.wait_for("event=reload-failed .*no regular file, but it is read again later")
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()
    os.close(ours)
    os.close(theirs)


def test_an_env_file_that_grew_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "env"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # a sparse one

    with pytest.raises(ValueError, match=r"more than 1048576 bytes"):
        contents(str(file))


def test_no_file_is_made_that_others_may_write(start: Start) -> None:
    before = os.umask(0)
    try:
        start.up("--umask", "0", "unix:s?mode=0600", "--", *MINIMAL)
    finally:
        os.umask(before)

    modes = {
        path.name: oct(path.lstat().st_mode & 0o7777)
        for path in (start.pid_file, start.log_file, start.folder / "s")
    }
    assert modes == {"pid": "0o644", "log": "0o640", "s": "0o600"}
    assert subprocess.run(["test", "-S", start.folder / "s"]).returncode == 0
    start.stop()
