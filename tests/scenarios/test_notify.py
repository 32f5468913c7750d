"""What workers say to the protector: it is heard, from them alone, and wherever they speak."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.namespaces import (
    STRANGER,
    any_users_python,
    in_user_namespace,
    needs_root,
    of_user,
)
from tests.procfs import environment_of
from tests.running import COMMAND, WORKERS, Lines, Protector, ask, eventually
from tests.scenarios.adopting import ECHO, kill_protector, revived, upgrade
from tests.scenarios.operating import Operated, Operating
from tests.scenarios.tools import spawned

STARTS = 8
Starter = Callable[..., Protector]
#: Says to which sockets of workers a stranger can get, by all that he can learn of them.
TRIES = """
import os, re, socket
from pathlib import Path
found = []
for line in Path("/proc/net/unix").read_text().splitlines():
    name = line.split()[-1]
    if "/.notify-" in name:
        found += [os.path.join(os.path.dirname(name), each) for each in ("new", "1")]
        try:
            found += os.listdir(os.path.dirname(name))
        except (PermissionError, FileNotFoundError):  # of another test, which has ended
            pass
for path in found:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        try:
            one.connect(path)
            print("connected to", path)
        except OSError:
            pass
print(len(found) > 0)
"""
#: Says READY=1 in a worker's place.
SAYS = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
    one.sendto(b"READY=1", sys.argv[1].replace("@", "\\0", 1))
"""


def address_of(pid: int) -> str:
    """The notify address of a worker."""
    # The parent goes on after the fork, before there is an environment.
    eventually(lambda: "NOTIFY_SOCKET" in environment_of(pid), "an environment")
    return environment_of(pid)["NOTIFY_SOCKET"]


def folders() -> list[Path]:
    return sorted(Path(os.environ["XDG_RUNTIME_DIR"]).glob("**/.notify-*"))


@pytest.mark.costly
def test_ready_behind_a_hundred_messages_is_heard_at_each_start(protector: Starter) -> None:
    daemon = protector("127.0.0.1:0", "--", sys.executable, WORKERS / "talks_first.py").ready()

    for _ in range(STARTS - 1):
        daemon.reload()

    assert ask(("127.0.0.1", daemon.port)).endswith("hello")
    daemon.stop()


@needs_root
def test_a_stranger_cannot_get_at_a_workers_socket(protector: Starter) -> None:
    daemon = protector("--workers", "3", "127.0.0.1:0", "--", *ECHO).ready()

    with of_user(STRANGER, TRIES) as process:
        assert process.communicate()[0].decode() == "True\n"
    daemon.stop()
    assert folders() == []


@needs_root
@pytest.mark.parametrize(
    "options",
    [(), ("--user", "games"), ("--user", "games", "--worker-user", "nobody"), ("--guard",)],
    ids=" ".join,
)
@pytest.mark.costly
def test_workers_of_every_user_are_heard_there(
    protector: Starter, tmp_path: Path, options: tuple[str, ...]
) -> None:
    python, path = any_users_python()
    tmp_path.chmod(0o755)
    says = (
        "import os, socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto("
        "b'READY=1', os.environ['NOTIFY_SOCKET']); socket.socket(fileno=int("
        "os.environ['SOCKETPROTECTOR_CHANNEL'])).recv(1)"
    )
    pid_file = ("--pid-file", tmp_path / "pid")
    command = (python, "-I", "-c", says)
    daemon = protector(*options, *pid_file, "127.0.0.1:0", "--", *command, PYTHONPATH=path).ready()

    folder = Path(address_of(spawned(daemon)[0])).parent
    assert folder.name.startswith(".notify-")
    daemon.stop()
    assert not folder.exists()
    assert folders() == []


@pytest.mark.costly
def test_what_a_killed_protector_leaves_is_removed_by_the_next_start_and_no_more(
    protector: Starter,
) -> None:
    living = protector("127.0.0.1:0", "--", *ECHO).ready()
    killed = protector("127.0.0.1:0", "--", *ECHO).ready()
    assert len(folders()) == 2
    left = [each for each in folders() if not address_of(spawned(living)[0]).startswith(f"{each}/")]
    killed.process.kill()
    killed.wait()
    assert len(folders()) == 2

    third = protector("127.0.0.1:0", "--", *ECHO).ready()

    assert left[0] not in folders()
    assert len(folders()) == 2
    living.reload()  # it goes on in its own
    for each in (living, third):
        each.stop()
    assert folders() == []


@pytest.mark.costly
def test_an_upgrade_and_a_restart_by_the_guard_go_on_in_the_same_folder(
    protector: Starter, tmp_path: Path
) -> None:
    pid_file = ("--pid-file", tmp_path / "pid")
    daemon = protector("--guard", *pid_file, "127.0.0.1:0", "--", *ECHO).ready()
    [folder] = folders()
    addresses = [address_of(spawned(daemon)[0])]

    for kill in (False, True):
        if kill:
            revived(daemon, kill_protector(daemon))
        else:
            # To the guard's child: SIGUSR2 is passed on.
            assert "event=resumed" in upgrade(daemon)
        daemon.reload()
        addresses.append(address_of(spawned(daemon)[-1]))

    assert {str(Path(each).parent) for each in addresses} == {str(folder)}
    assert len(set(addresses)) == 3
    protector("127.0.0.1:0", "--", *ECHO).ready().stop()  # its lock was kept: nothing is swept
    assert folders() == [folder]
    daemon.reload()
    daemon.stop()
    assert folders() == []


@pytest.mark.costly
def test_a_worker_is_heard_on_its_path_after_an_upgrade(operated: Operating) -> None:
    web: Operated = operated(command=ECHO)
    [pid] = spawned(web.daemon)
    assert "event=resumed" in upgrade(web.daemon)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.sendto(b"STATUS=said after the upgrade", address_of(pid))

    def said() -> bool:
        [worker] = web.generation(1)["workers"]
        return bool(worker["status"] == "said after the upgrade")

    eventually(said, "its status")


@pytest.mark.costly
def test_a_folder_that_was_removed_keeps_no_worker_from_starting(protector: Starter) -> None:
    daemon = protector("127.0.0.1:0", "--", *ECHO).ready()
    [folder] = folders()
    shutil.rmtree(folder)

    daemon.reload()

    assert address_of(spawned(daemon)[-1]).startswith("@")
    daemon.log.wait_for("event=notify-socket-abstract worker=2 .*No such file or directory")
    assert "event=resumed" in upgrade(daemon)  # which finds it under that name
    daemon.reload()
    daemon.stop()


@pytest.fixture
def nowhere() -> tuple[str, ...]:
    """What lets a command find no folder that it could write to."""
    if os.getuid() != 0:
        needs.skip("root")
    read_only = "mount --rbind $each $each; mount -o remount,ro,bind $each"
    script = f'for each in /tmp /run; do {read_only}; done; exec "$@"'
    return ("unshare", "-m", "sh", "-ec", script, "sh")


def test_where_no_folder_can_be_made_it_is_said_and_names_are_abstract(
    nowhere: tuple[str, ...], marked_environment: dict[str, str]
) -> None:
    words = ("127.0.0.1:0", "--", *ECHO)
    daemon = Protector(words, marked_environment, through=nowhere)
    try:
        notice = daemon.log.wait_for("event=notice .*private folder")
        assert "Read-only file system" in notice
        assert address_of(spawned(daemon.ready())[0]).startswith("@")
        daemon.stop()
    finally:
        daemon.end()

    checked = subprocess.run(
        [*nowhere, *COMMAND, "--check", *words], capture_output=True, text=True, check=True
    )
    assert "no private folder for the workers' notify sockets" in checked.stderr
    assert "Read-only file system" in checked.stderr


@needs_root
@pytest.mark.costly
def test_a_stranger_is_not_taken_for_nobody_in_a_user_namespace(
    nowhere: tuple[str, ...], marked_environment: dict[str, str]
) -> None:
    """The worst case: no folder, the host's network, and the number that strangers share."""
    python, _ = any_users_python()
    silent = ("sleep", "60")
    options = ("--user", "nobody", "--start-timeout", "60s", "--stop-timeout", "1s", "--no-control")
    words = (python, *COMMAND[1:], "-f", *options, "127.0.0.1:0", "--", *silent)
    # The mounts first: they are not that namespace's to make.
    receive, send = os.pipe()
    with in_user_namespace(
        *words, through=nowhere, environment=marked_environment, stderr=send
    ) as process:
        os.close(send)
        log = Lines(receive)
        pid = int(log.wait_for("event=spawned").rpartition("=")[2])
        for user in (STRANGER, 100_000):  # the second is root in there, and believed
            assert log.count("event=worker-ready") == 0
            with of_user(user, SAYS, address_of(pid)) as says:
                assert says.wait() == 0
        log.wait_for("event=worker-ready")
        process.terminate()
        assert process.wait() == 0
    log.join()
