"""What belongs to a user: as many processes as it may have, and which ones it may signal."""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import needs
from tests.running import Client, Protector, ask
from tests.scenarios.tools import pid_in, spawned, watch_for_spinning, worker, worker_for_any_user

pytestmark = needs.ANOTHER_USER
needs_setpriv = needs.programs("setpriv", "prlimit")


def users_with_processes() -> set[int]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add(process.stat().st_uid)
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
def lone_users() -> Iterator[list[str]]:
    """Two users without a process, which no other test takes: RLIMIT_NPROC counts all of one's."""
    # Runs of these tests share no network and no folder, but they share the machine's users.
    with open("/etc/passwd", encoding="utf-8") as machine:
        fcntl.flock(machine, fcntl.LOCK_EX)
        names: list[str] = []
        for entry in pwd.getpwall():
            if entry.pw_uid in users_with_processes() or entry.pw_name in ("games", "nobody"):
                continue  # other tests become those
            names.append(entry.pw_name)
            if len(names) == 2:
                yield names
                return
    needs.skip("two users without any process")


@contextmanager
def busy(user: str) -> Iterator[None]:
    """Give a user more processes than the limits here allow; the test's own limit is another."""
    with ExitStack() as stack:
        # setuid() does not count the process that calls it, so 4 would leave room for one.
        for _ in range(5):
            process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=user)
            stack.enter_context(process)  # which closes its stdin and waits
        yield


@needs_setpriv
@pytest.mark.parametrize("kind", ["user", "worker-user"])
def test_without_processes_a_reload_fails_a_respawn_backs_off_and_both_recover(
    kind: str, lone_users: list[str], marked_environment: dict[str, str]
) -> None:
    own, other = lone_users
    users = ("--user", own, *(("--worker-user", other) if kind == "worker-user" else ()))
    daemon = Protector(
        [*users, "--chdir", "/", "127.0.0.1:0", "--", *worker_for_any_user()],
        marked_environment,
        through=("prlimit", "--nproc=4"),
    )
    try:
        daemon.ready()
        (first,) = spawned(daemon)
        with busy(other if kind == "worker-user" else own):
            mark = daemon.signal(signal.SIGHUP)
            daemon.log.wait_for("event=reload-failed .*RLIMIT_NPROC", after=mark)
            assert ask(("127.0.0.1", daemon.port)).startswith(f"[{first}]")

            os.kill(first, signal.SIGKILL)
            daemon.log.wait_for("event=exited .*RLIMIT_NPROC", after=mark)
            client = Client(("127.0.0.1", daemon.port), "waits")
            watch_for_spinning(daemon.pid, 3, daemon)
            assert spawned(daemon) == [first]

        assert client.hear().startswith(f"[{spawned(daemon)[-1]}] waits")
        client.close()
        daemon.reload()
        daemon.stop()
    finally:
        daemon.end()
        print(daemon.log.text())


WITHOUT_CAP_KILL = ("setpriv", "--bounding-set", "-kill")


@needs_setpriv
def test_a_worker_that_may_not_be_signalled_is_reported_and_waited_for(
    marked_environment: dict[str, str],
) -> None:
    """It has become another user's, and we are not root, which could signal it all the same."""
    limits = ("--drain-timeout", "0.1s", "--kill-timeout", "0.1s", "--stop-timeout", "0.1s")
    daemon = Protector(
        [*limits, "127.0.0.1:0", "--", *worker("drops_root")],
        marked_environment,
        through=WITHOUT_CAP_KILL,
    )
    try:
        daemon.ready()
        (first,) = spawned(daemon)
        with Client(("127.0.0.1", daemon.port)) as held:
            assert pid_in(held.ask()) == first
            mark = daemon.signal(signal.SIGHUP)
            for sign in ("TERM", "KILL"):
                said = f"event=cannot-signal worker=1 pid={first} signal={sign} .*not permitted"
                daemon.log.wait_for(said, after=mark)
            assert pid_in(ask(("127.0.0.1", daemon.port))) != first
            assert pid_in(held.ask()) == first  # it could not be ended
        daemon.log.wait_for("event=exited generation=1", after=mark)

        with Client(("127.0.0.1", daemon.port)) as held:
            held.ask()
            mark = daemon.signal(signal.SIGTERM)
            daemon.log.wait_for("event=cannot-signal worker=2 .*signal=KILL", after=mark)
            assert daemon.process.poll() is None  # only a worker that was seen to end is gone
        assert daemon.wait() == 0
    finally:
        daemon.end()
        print(daemon.log.text())


@needs_setpriv
@pytest.mark.parametrize("owner", [(), ("--user", "nobody")], ids=["root", "user"])
def test_without_cap_fowner_the_control_socket_is_for_both_groups(
    owner: tuple[str, ...], place: Path, marked_environment: dict[str, str]
) -> None:
    """As under the shipped units: root may set an access list on its own file only."""
    groups = ("--control-group", "games", "--status-group", "nogroup")
    sleeps = ("--ready", "after:1ms", "127.0.0.1:0", "--", "/bin/sleep", "1000")
    daemon = Protector(
        ["--control", str(place), *owner, *groups, *sleeps],
        marked_environment,
        through=("setpriv", "--bounding-set=-fowner"),
    )
    try:
        daemon.ready()
        found = place.stat()
        assert (found.st_uid, found.st_gid) == (pwd.getpwnam("nobody").pw_uid if owner else 0, 60)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert "system.posix_acl_access" in os.listxattr(place)
    finally:
        daemon.end()
        print(daemon.log.text())
