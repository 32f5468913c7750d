"""Where /proc is not mounted, hides other users' processes, or is another PID namespace's."""

from __future__ import annotations

import itertools
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.own_folder import let_through
from tests.rounds import some
from tests.running import Protector, ask, eventually
from tests.scenarios import tools
from tests.systems.life import ELSEWHERE, NAME, Surroundings, lived

pytestmark = needs.ANOTHER_USER
NO_PROC = (*ELSEWHERE, "--no-proc", "--")
HIDEPID = (*ELSEWHERE, "--hidepid", "--")
MANY = tools.worker("many")
USER = ("--user", "nobody")
OTHER_USER = (*USER, "--worker-user", "daemon")


@pytest.fixture
def any_users(tmp_path: Path) -> Path:
    """A folder that belongs to the user dropped to, by a path that any user may follow."""
    nobody = pwd.getpwnam("nobody")
    place = tmp_path / "nobodys"
    place.mkdir()
    os.chown(place, nobody.pw_uid, nobody.pw_gid)
    let_through(tmp_path)
    return place


#: What can be seen, and by which user.
SIGHT = {
    "no /proc": (NO_PROC, ()),
    "no /proc, other users": (NO_PROC, OTHER_USER),
    "hidepid": (HIDEPID, USER),
    "hidepid, other users": (HIDEPID, OTHER_USER),
}


@pytest.mark.parametrize(
    ("sight", "mode"),
    some(
        list(itertools.product(SIGHT, ("connection", "listener"))),
        few=[
            ("no /proc", "connection"),
            ("no /proc, other users", "listener"),
            ("hidepid", "listener"),
            ("hidepid, other users", "connection"),
        ],
    ),
)
def test_a_whole_life(
    any_users: Path, marked_environment: dict[str, str], sight: str, mode: str
) -> None:
    through, options = SIGHT[sight]
    if not options:
        os.chown(
            any_users, 0, 0
        )  # where another user owns the folder, root does not trust its files
    lived(Surroundings(any_users, marked_environment, through, mode=mode, options=options))


@pytest.fixture
def web(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Protector]:
    """A protector without /proc whose options need it."""
    words = ("--max-memory", "1M", "127.0.0.1:0", "--", *MANY)
    daemon = Protector(words, marked_environment, through=NO_PROC)
    yield daemon.ready()
    daemon.end()


@pytest.mark.costly
def test_that_a_workers_memory_is_not_known_is_said_once(web: Protector) -> None:
    line = web.log.wait_for("event=cannot-examine")
    assert "--max-memory has no effect" in line

    web.reload()
    web.reload()  # takes longer than a look

    assert web.log.count("event=cannot-examine") == 1
    assert web.log.count("event=replacing") == 0
    web.stop()


@pytest.mark.costly
def test_what_a_failed_worker_leaves_is_not_looked_for_and_that_is_said_once(
    tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    worker = tools.worker("dies_before_ready")
    daemon = Protector(["127.0.0.1:0", "--", *worker], marked_environment, through=NO_PROC)
    try:
        assert daemon.wait() != 0
        line = daemon.log.wait_for("event=cannot-examine")
        assert "no /proc of this PID namespace" in line
        assert daemon.log.count("event=cannot-examine") == 1
    finally:
        daemon.end()


@pytest.mark.parametrize("through", [NO_PROC, HIDEPID])
@pytest.mark.costly
def test_ctl_says_that_it_cannot_see_connections_instead_of_none(
    tmp_path: Path, marked_environment: dict[str, str], through: tuple[str, ...]
) -> None:
    """Another user than root looks; without /proc no user could."""
    listening = Protector(
        ["--name", NAME, "--control-group", "nogroup", "127.0.0.1:0", "--", *MANY],
        marked_environment,
    ).ready()
    try:
        around = Surroundings(tmp_path, marked_environment, through)
        if through is HIDEPID:
            around.through = (*ELSEWHERE, "--hidepid", "--nobody", "--")
        assert ask(("127.0.0.1", listening.port))
        shown = around.run("--name", NAME, "connections", module="socketprotector.ctl")
        assert "hidepid" in shown.stdout + shown.stderr
        assert "no connections that this user can see" in shown.stdout
        listening.stop()
    finally:
        listening.end()


def test_the_guard_that_gives_up_removes_its_pid_file(
    tmp_path: Path, marked_environment: dict[str, str]
) -> None:
    """As one whose protector ends before it has ever accepted: here it cannot be loaded."""
    pid_file = tmp_path / "pid"
    script = (
        "import os, sys; from socketprotector.launch import pid_file;"
        "from socketprotector.programs import guard; from socketprotector.system import inherited;"
        "held = pid_file.PidFile(sys.argv[1]); held.acquire();"
        "left = inherited.kept_through_exec({inherited.PID_FILE: held.fd});"
        "os.environ.update(left.__enter__());"
        "told = guard.PID_FILE_OPTION + sys.argv[1];"
        "words = ['-I', '-S', guard.__file__, told, sys.executable, '-c', 'raise SystemExit(7)'];"
        "os.execv(sys.executable, [sys.executable, *words])"
    )

    done = subprocess.run(
        [*NO_PROC, sys.executable, "-c", script, str(pid_file)],
        env={**os.environ, **marked_environment},
        stderr=subprocess.PIPE,
        check=False,
        text=True,
    )

    assert done.returncode == 7
    assert re.fullmatch(r".* event=guard-gives-up .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owner", ["user=nobody", "group=nogroup"])
@pytest.mark.costly
def test_a_unix_listener_and_a_log_file_get_their_owner(
    any_users: Path, marked_environment: dict[str, str], owner: str
) -> None:
    log = any_users / "log"
    daemon = Protector(
        [*USER, "--log-file", str(log), f"unix:{any_users}/web?{owner}", "--", *MANY],
        marked_environment,
        through=NO_PROC,
    )
    try:
        eventually(lambda: log.exists() and "event=ready" in log.read_text(), "ready")
        assert ask(str(any_users / "web"))
        found = (any_users / "web").stat()
        kept = found.st_uid if owner.startswith("user") else found.st_gid
        assert kept == 65534
        assert log.stat().st_uid == pwd.getpwnam("nobody").pw_uid
        daemon.stop()
    finally:
        daemon.end()


def test_another_namespaces_proc_is_not_believed() -> None:
    """Its numbers are of other processes: a kill by number would hit one of those."""
    script = (
        "import os; from socketprotector.system import procfs;print(os.getpid(), procfs.is_ours())"
    )
    words = ("unshare", "--pid", "--fork", *(sys.executable, "-c", script))

    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)

    assert done.stdout == "1 False\n"
