"""--user and --group: bind as root, then never be root again."""

from __future__ import annotations

import grp
import os
import pwd
import random
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import any_users_python
from tests.procfs import status_of
from tests.running import DEADLINE_S, WORKERS, Ended, ask, eventually, wait_gone
from tests.scenarios.operating import Line
from tests.scenarios.starting import Start, told
from tests.unanswered import Unanswered, from_next_door

pytestmark = needs.ANOTHER_USER


@pytest.fixture(scope="session")
def python() -> str:
    """A Python that the user `nobody` can execute."""
    return any_users_python()[0]


def may_raise_limits() -> bool:
    """Whether root may raise hard limits here; in some containers it may not."""
    try:
        with subprocess.Popen(
            ["true"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NICE, (23, 23)),
        ) as process:
            return process.wait() == 0
    except subprocess.SubprocessError:
        return False


def low_port() -> int:
    """A free port that only root may bind."""
    for port in random.sample(range(600, 1024), 400):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    needs.skip("a free port below 1024")


@pytest.fixture
def theirs(start: Start) -> Iterator[Path]:
    """A folder of the user nobody, in which the test's files are."""
    with tempfile.TemporaryDirectory(prefix="socketprotector-") as name:
        folder = Path(name)
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        start.folder = folder
        start.pid_file = folder / "pid"
        start.log_file = folder / "log"
        yield folder
        start.end()


def identity_of(pid: int) -> dict[str, list[int]]:
    """User, group and supplementary groups of a process."""
    status = status_of(pid)
    return {name: [*map(int, status[name].split())] for name in ("Uid", "Gid", "Groups")}


def test_everything_runs_as_that_user_from_before_the_first_worker(
    start: Start, theirs: Path, python: str
) -> None:
    nobody = pwd.getpwnam("nobody")
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))

    # A low port and the caller's groups are root's: bound before, dropped after.
    port = low_port()
    words = (f"127.0.0.1:{port}", "unix:s?mode=0600", "--", *command)
    ended = start.up("--user", "nobody", *words, extra_groups=[0, 1])

    assert ended.err == "", "the folder is that user's: nothing to say"
    found = told(("127.0.0.1", port))
    groups = sorted(os.getgrouplist("nobody", nobody.pw_gid))
    assert found["uids"] == [nobody.pw_uid] * 3
    assert found["gids"] == [nobody.pw_gid] * 3
    assert sorted(found["groups"]) == groups
    resident = identity_of(start.pid)
    assert resident["Uid"] == [nobody.pw_uid] * 4
    assert resident["Gid"] == [nobody.pw_gid] * 4
    assert sorted(resident["Groups"]) == groups
    start.stop()
    assert start.left() == [], "it could remove what it made as root"


def test_a_port_that_only_root_may_bind_can_be_held(
    start: Start, theirs: Path, python: str
) -> None:
    """The socket for that is bound before."""
    address, control = ("127.0.0.1", low_port()), theirs / "control"
    words = ("--handoff", "listener", "--control", control, f"127.0.0.1:{address[1]}")
    server = (python, "-S", "-E", str(WORKERS / "accepts.py"))
    ended = start.up("--user", "nobody", *words, "--", *server)
    assert ended.status == 0, ended.err
    with Line(control) as line:
        for _ in range(2):
            line.ask("hold", seconds=3600)
            with Unanswered(address) as late:
                late.tries_again()
                line.ask("release")
                late.connects()
                late.say("hello")
                assert late.hear().endswith(" hello")
    start.stop()
    assert start.left() == []


def test_the_order_is_bind_then_pid_file_then_drop_then_workers(
    start: Start, theirs: Path, python: str
) -> None:
    """In a folder that is root's, only what happens before the drop can be made."""
    os.chown(theirs, 0, 0)
    theirs.chmod(0o755)
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))

    ended = start.up("--user", "nobody", "unix:s?mode=0600", "--", *command)

    assert ended.lines == [
        f"SocketProtector: {theirs} should belong to user nobody: files there cannot be removed at "
        "the end"
    ]
    assert f'event=notice text="{theirs} should belong to user nobody' in start.log
    assert start.pid_file.owner() == "nobody"
    assert (theirs / "s").stat().st_uid == 0
    pid = start.pid
    start.stop()
    assert not wait_gone([pid])
    assert sorted(start.left()) == [f"{theirs}/pid", f"{theirs}/s"], "as it was said"


@pytest.mark.parametrize("how", ["fails", "is interrupted"])
def test_a_start_that_fails_leaves_nothing_in_folders_of_roots(
    start: Start, theirs: Path, how: str
) -> None:
    os.chown(theirs, 0, 0)
    theirs.chmod(0o755)
    control = theirs / "control"
    options = (
        "--log-file",
        start.log_file,
        "--user",
        "nobody",
        "--control",
        control,
        "unix:s?mode=0600",
    )
    if how == "fails":
        ended = start("--start-tries", "1", *options, "--", "/bin/false")
        assert ended.status == 3
    else:
        words = ("--pid-file", start.pid_file, *options, "--", "/bin/sleep", "1000")
        with start.popen(*words) as process:
            start.wait_for("event=spawned")
            assert control.is_socket()
            process.terminate()
            process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 130

    assert start.left() == []


def test_folders_of_several_files_are_named_in_one_line(
    start: Start, theirs: Path, python: str
) -> None:
    other = theirs / "run.sh"
    other.mkdir()
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))
    os.chown(theirs, 0, -1)
    theirs.chmod(0o755)

    ended = start.up("--user", "nobody", f"unix:{other}/s?mode=0600", "--", *command)

    assert len(ended.lines) == 1
    assert f"{theirs} and {other} should belong to user nobody" in ended.err
    start.stop()


def test_the_folder_of_the_log_may_be_roots(start: Start, theirs: Path, python: str) -> None:
    """As packages have /var/log/socketprotector: a rotation makes the new file for the user."""
    logs = theirs / "logs"
    logs.mkdir()
    os.chown(logs, 0, 0)
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))

    ended = start.up(
        "--user", "nobody", "--log-file", logs / "log", "unix:s?mode=0600", "--", *command
    )

    assert ended.lines == []
    (logs / "log").rename(logs / "log.1")
    (logs / "log").touch()
    os.chown(logs / "log", pwd.getpwnam("nobody").pw_uid, -1)
    os.kill(start.pid, signal.SIGUSR1)
    eventually(lambda: "event=reopened" in (logs / "log").read_text(), "the new log")
    start.stop()


def test_a_group_of_ones_own_choice(start: Start, theirs: Path, python: str) -> None:
    group = next(g for g in grp.getgrall() if g.gr_gid not in (0, pwd.getpwnam("nobody").pw_gid))
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))

    start.up("--user", "nobody", "--group", group.gr_name, "unix:s?mode=0600", "--", *command)

    found = told(f"{theirs}/s")
    assert found["gids"] == [group.gr_gid] * 3
    assert group.gr_gid in found["groups"]
    assert 0 not in found["groups"]
    start.stop()


def test_the_log_can_be_reopened_after_the_drop(start: Start, theirs: Path, python: str) -> None:
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))
    start.up("--user", "nobody", "unix:s?mode=0600", "--", *command)
    (theirs / "log").rename(theirs / "log.1.sh")

    start.send(signal.SIGUSR1)

    eventually(lambda: "event=reopened" in start.log, "the new log")
    assert start.log_file.stat().st_uid == pwd.getpwnam("nobody").pw_uid
    start.send(signal.SIGUSR1)
    eventually(lambda: start.log.count("event=reopened") == 2, "the same log opened again")
    start.stop()


def test_a_link_in_that_users_folder_is_not_written_through_as_root(
    start: Start, theirs: Path
) -> None:
    with tempfile.NamedTemporaryFile() as precious:
        (theirs / "log").symlink_to(precious.name)

        ended = start("--log-file", "log", "--user", "nobody", "unix:s?mode=0600", "--", "true")

        assert ended.status == 111
        assert "cannot write the log file" in ended.err
        assert precious.read() == b""


def test_a_nice_value_below_zero_is_had_as_another_user(
    start: Start, theirs: Path, python: str
) -> None:
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))

    ended = start("--user", "nobody", "--limit", "nice=-3", "unix:s?mode=0600", "--", *command)

    if may_raise_limits():
        assert told(f"{theirs}/s")["nice"] == -3
        start.stop()
    else:
        assert ended.status == 111
        assert "cannot allow nobody nice -3: " in ended.err
        assert start.left() == []


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("what", ["command", "interpreter", "directory", "link", "script"])
def test_what_that_user_cannot_execute_is_refused_at_once(
    start: Start, theirs: Path, what: str, check: bool
) -> None:
    closed, script = theirs / "closed.sh", theirs / "script.sh"
    closed.mkdir(mode=0o700)
    shutil.copy("/bin/sleep", closed / "sleep")
    script.write_text(f"#!{closed}/sleep\n")
    script.chmod(0o700 if what == "script" else 0o755)
    (closed / "inner").mkdir()
    (theirs / "link.sh").symlink_to(closed / "inner")
    where = {"directory": closed, "link": theirs / "link.sh"}.get(what, theirs)
    elsewhere = Path("/bin/sleep") if where != theirs else script
    command = closed / "sleep" if what == "command" else elsewhere
    words = (
        "--ready",
        "after:1ms",
        "--chdir",
        str(where),
        "unix:s?mode=0600",
        "--",
        command,
        "1000",
    )

    ended = start(*(("--check",) if check else ()), "--user", "nobody", *words)

    assert ended.status == 111
    [line] = ended.lines
    verb = f"enter {where}/" if where != theirs else "execute "
    assert line.startswith(f"SocketProtector: --user nobody cannot {verb}")
    assert what != "command" or f"execute {command}" in line
    whose = f"{script} is closed to that user (-rwx------ root)"
    folder = f"the folder {closed} is closed to that user (drwx------ root)"
    assert (whose if what == "script" else folder) in line
    assert ("(--chdir)" in line) == (where != theirs)
    assert start.left() == []


@pytest.mark.parametrize("check", [True, False])
def test_an_env_file_that_this_user_cannot_read_is_refused_at_once(
    start: Start, theirs: Path, check: bool
) -> None:
    secret = theirs / "secret.env"
    secret.write_text("KEY=1\n")
    secret.chmod(0o600)
    words = ("--chdir", str(theirs), "--ready", "after:1ms", "--env-file", str(secret))
    wanted = ("unix:s?mode=0600", "--", "/bin/sleep", "1000")

    ended = start(*(("--check",) if check else ()), "--user", "nobody", *words, *wanted)

    assert ended.status == 2
    [line] = ended.lines
    assert (
        line == f"SocketProtector: --env-file {secret}: user nobody cannot read it (chown, chmod)"
    )
    assert start.left() == [str(secret)]


@pytest.mark.parametrize("named", ["{file}", "./web.env", "{link}", "{folder}/web.env"])
@pytest.mark.parametrize("user", ["nobody", "root"])
def test_an_env_file_that_this_user_can_read_is_not_refused(
    start: Start, theirs: Path, named: str, user: str
) -> None:
    file, link, folder = theirs / "web.env", theirs / "link.env", theirs / "folder"
    file.write_text("KEY=1\n")
    file.chmod(0o644)  # no program
    link.symlink_to(file)
    folder.symlink_to(theirs)
    path = named.format(file=file, link=link, folder=folder)
    words = ("--chdir", str(theirs), "--ready", "after:1ms", "--env-file", path)

    ended = start("--check", "--user", user, *words, "unix:s?mode=0600", "--", "/bin/sleep", "1000")

    assert ended.status == 0, ended.err


def test_what_that_user_may_execute_by_its_group_is_not_refused(start: Start, theirs: Path) -> None:
    ours = theirs / "ours.sh"
    ours.mkdir(mode=0o750)
    os.chown(ours, 0, pwd.getpwnam("nobody").pw_gid)
    shutil.copy("/bin/sleep", ours / "sleep")

    ended = start("--check", "--user", "nobody", "unix:s?mode=0600", "--", ours / "sleep", "1000")

    assert ended.status == 0, ended


def test_a_number_may_stand_for_the_user(start: Start, theirs: Path, python: str) -> None:
    uid = pwd.getpwnam("nobody").pw_uid
    command = (python, "-S", "-E", str(WORKERS / "tells.py"))

    start.up("--user", str(uid), "unix:s?mode=0600", "--", *command)

    assert told(f"{theirs}/s")["uids"] == [uid] * 3
    start.stop()


# -- as a user other than root -------------------------------------------------


@pytest.fixture
def as_nobody(start: Start, theirs: Path, python: str) -> Callable[..., Ended]:
    """Run the command as the user nobody, from a Python and modules that user can read."""
    environment = {"PYTHONPATH": any_users_python()[1]}

    def run(*words: str) -> Ended:
        return start(
            *words,
            command=(python, "-m", "socketprotector"),
            environment=environment,
            user="nobody",
            group="nogroup",
            extra_groups=[],
        )

    return run


def test_a_hold_of_an_ordinary_user_resets_no_client_whatever_its_ttl(
    start: Start, theirs: Path, as_nobody: Callable[..., Ended], python: str
) -> None:
    control = theirs / "control"
    words = ("--handoff", "listener", "--control", str(control), "127.0.0.1:0")
    server = (python, "-S", "-E", str(WORKERS / "accepts.py"))
    ended = as_nobody("--log-file", str(start.log_file), *words, "--", *server)
    assert ended.status == 0, ended.err
    with Line(control) as line:
        line.ask("hold", seconds=3600)
        with Unanswered(start.address) as late, Unanswered(start.address, from_next_door) as near:
            for each in (late, near):
                each.tries_again()
            line.ask("release")
            for each in (late, near):
                each.connects()
                each.say("hello")
                assert each.hear().endswith(" hello")
                each.close()  # the server serves one after the other
    start.stop()


def test_a_low_port_needs_the_right(
    start: Start, as_nobody: Callable[..., Ended], python: str
) -> None:
    if Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip() == "0":
        needs.skip("a port that is only for root")

    ended = as_nobody(f"127.0.0.1:{low_port()}", "--", python, str(WORKERS / "minimal.py"))

    assert ended.status == 111
    assert "needs root or CAP_NET_BIND_SERVICE" in ended.err
    assert start.left() == []


@pytest.mark.parametrize("option", ["--user", "--group"])
def test_without_root_it_cannot_become_another_user(
    as_nobody: Callable[..., Ended], option: str
) -> None:
    ended = as_nobody(option, "0", "unix:s?mode=0600", "--", "true")

    assert ended.status == 2
    assert "need root; leave them out or start as root" in ended.err


def test_a_nice_value_below_zero_needs_root(as_nobody: Callable[..., Ended]) -> None:
    ended = as_nobody("--limit", "nice=-1", "unix:s?mode=0600", "--", "true")

    assert ended.status == 2
    assert "--limit nice=-1: below 0 needs root" in ended.err


def test_any_user_can_run_it_with_what_the_python_path_leads_to(
    start: Start, as_nobody: Callable[..., Ended], python: str
) -> None:
    """No root, nothing installed, no log file: the relay runs too."""
    ended = as_nobody("unix:s?mode=0600", "--", python, "-S", "-E", str(WORKERS / "minimal.py"))

    assert ended.status == 0, ended
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()
    assert start.left() == []


def test_a_port_in_use_is_refused_where_the_system_does_not_say_by_which_process(
    start: Start, as_nobody: Callable[..., Ended]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = as_nobody(f"127.0.0.1:{taken.getsockname()[1]}", "--", "true")

    assert ended.status == 111
    assert "another program has it: stop that program, or choose another address" in ended.err
    assert start.left() == []
