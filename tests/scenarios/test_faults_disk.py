"""Disks that are full or write-protected: under the pid file, the log and what workers print.

It does not matter to any of these how connections come to workers, so each is run one way.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import Client, Ended, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import protector_pid
from tests.scenarios.faults import Disk, injected, listens, reload_unseen
from tests.scenarios.starting import MINIMAL, Start
from tests.scenarios.tools import worker

# -- the pid file --------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("-f",), ("--guard",)], ids=["detached", "-f", "guarded"])
@pytest.mark.parametrize(
    ("state", "error"),
    [("full", "No space left on device"), ("write-protected", "Read-only file system")],
)
def test_a_pid_file_that_cannot_be_written_is_refused_and_nothing_is_left(
    start: Start, new_disk: Callable[[str], Disk], mode: tuple[str, ...], state: str, error: str
) -> None:
    disk = new_disk("4k")
    disk.fill() if state == "full" else disk.write_protect()
    before = list(disk.seen.iterdir())
    start.pid_file = disk.path / "pid"

    ended = start(*mode, f"unix:{start.folder}/s?mode=0600", "--", *MINIMAL, before=disk.before)

    assert ended.status == 111, ended
    (line,) = ended.lines
    assert f"cannot write the pid file {start.pid_file}: {error}" in line
    assert list(disk.seen.iterdir()) == before
    assert start.left() == []


def end_unguarded(daemon: Protector) -> None:
    """Stop a protector whose guard was killed, and see that it ends."""
    pid = protector_pid(daemon)
    os.kill(pid, signal.SIGTERM)
    assert wait_gone([pid]) == []


def test_without_its_guard_the_pid_file_is_rewritten_on_a_full_disk(
    on_disk: Callable[..., Protector], new_disk: Callable[[str], Disk]
) -> None:
    disk = new_disk("16k")
    words = ("--guard", "--pid-file", disk.path / "pid", "127.0.0.1:0", "--", *worker("many"))
    daemon = on_disk(disk, *words).ready()
    disk.fill()

    daemon.process.kill()

    daemon.log.wait_for("event=guard-died")
    eventually(
        lambda: (disk.seen / "pid").read_text() == f"{protector_pid(daemon)}\n", "its own pid"
    )
    assert daemon.log.count("event=pid-file-not-written") == 0
    end_unguarded(daemon)
    assert not (disk.seen / "pid").exists()


PID_FILE_FAILS = """
real = os.pwrite
def pwrite(fd, *rest):
    if os.path.exists({flag!r}) and os.readlink(f"/proc/self/fd/{{fd}}") == {path!r}:
        raise fault({code!r})
    return real(fd, *rest)
os.pwrite = pwrite
"""


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS"])
@pytest.mark.costly
def test_without_its_guard_a_pid_file_that_cannot_be_rewritten_is_reported(
    protector: Callable[..., Protector], tmp_path: Path, code: str
) -> None:
    """Where a file that is rewritten takes new space, as on btrfs; or it was remounted."""
    flag, pid_file = tmp_path / "flag", tmp_path / "pid"
    text = PID_FILE_FAILS.format(flag=str(flag), path=str(pid_file), code=code)
    words = ("--guard", "--pid-file", pid_file, "127.0.0.1:0", "--", *worker("many"))
    daemon = protector(*words, **injected(tmp_path / "fault", text)).ready()
    flag.touch()

    daemon.process.kill()

    daemon.log.wait_for("event=pid-file-not-written")
    assert ask(("127.0.0.1", daemon.port)).endswith("hello")
    flag.unlink()
    os.kill(protector_pid(daemon), signal.SIGUSR2)  # the next program tries again
    daemon.log.wait_for("event=resumed")
    eventually(lambda: pid_file.read_text() == f"{protector_pid(daemon)}\n", "its own pid")
    end_unguarded(daemon)
    assert not pid_file.exists()


# -- the log, and what workers print -------------------------------------------

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \w+ event="


def test_on_a_full_disk_lines_are_dropped_and_counted_and_nothing_else_stops(
    on_disk: Callable[..., Protector], new_disk: Callable[[str], Disk], tmp_path: Path
) -> None:
    disk = new_disk("32k")
    log, address = disk.seen / "log", str(tmp_path / "socket")
    options = ("--log-file", disk.path / "log", "--no-log-relay")
    daemon = on_disk(disk, *options, f"unix:{address}", "--", *worker("prints"))
    eventually(lambda: listens(address), "an answer")
    disk.fill()
    with Client(address) as held:
        while log.stat().st_size % 4096 < 4000:  # to the end of its last page
            held.ask("x" * 50)
        before = log.stat().st_size

        for _ in range(3):
            reload_unseen(daemon.process, address)
            assert held.ask("unprinted").endswith("unprinted")

        assert log.stat().st_size - before < 100  # what was left of that page
        disk.make_room()
        daemon.signal(signal.SIGUSR1)
        eventually(lambda: "event=reopened" in log.read_text(), "a line again")
        held.ask("printed")
    text = log.read_text()
    found = re.search(STAMP + r".* dropped_lines=(\d+)$", text, re.MULTILINE)
    assert found, text
    assert int(found[1]) >= 3 * 4  # of each reload: signal, spawned, worker-ready, reloaded
    assert "\nprinted\n" in text
    # No line of the protector is in pieces, or goes on where another one was cut off.
    own = [line for line in text.splitlines() if "event=" in line]
    assert [line for line in own if not re.match(STAMP, line)] == []
    daemon.process.terminate()
    assert daemon.wait() == 0


def test_on_a_full_disk_the_relay_drops_lines_and_holds_no_worker_up(
    on_disk: Callable[..., Protector], new_disk: Callable[[str], Disk], tmp_path: Path
) -> None:
    disk = new_disk("512k")  # what still waits in the pipe then cannot fill it again
    log, address = disk.seen / "log", str(tmp_path / "socket")
    options = ("--log-file", disk.path / "log")
    daemon = on_disk(disk, *options, f"unix:{address}", "--", *worker("prints"))
    eventually(lambda: listens(address), "an answer")
    disk.fill()
    with Client(address) as held:
        for number in range(200):  # more than there is room for in the pipe
            assert held.ask(f"{number} " + "x" * 1000).endswith("x")
        disk.make_room()

        def printed() -> bool:
            held.ask("printed")
            return "\nprinted\n" in log.read_text()

        eventually(printed, "a line again, on a line of its own")
    daemon.process.terminate()
    assert daemon.wait() == 0


# -- a user's quota --------------------------------------------------------------

#: As of a file system on which a user may have no more files, nor another block in one.
QUOTA = """
import builtins, socket

def refuse(path):
    if os.path.exists({flag!r}) and {part!r} in os.fsdecode(path):
        raise fault("EDQUOT")

def may_create(real):
    def opens(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            refuse(path)
        return real(path, flags, *rest, **more)
    return opens

def may_write(real):
    def writes(fd, *rest):
        refuse(os.readlink(f"/proc/self/fd/{{fd}}"))
        return real(fd, *rest)
    return writes

def may_make(real):
    def makes(path, *rest, **more):
        refuse(path)
        return real(path, *rest, **more)
    return makes

def bind(self, address, real=socket.socket.bind):
    if isinstance(address, str | bytes):
        refuse(address)
    return real(self, address)

os.open, os.mkdir, socket.socket.bind = may_create(os.open), may_make(os.mkdir), bind
os.write, os.pwrite = may_write(os.write), may_write(os.pwrite)
"""


class Quota:
    """A quota that is used up for files with a part of a name, while it is."""

    def __init__(self, folder: Path, part: str) -> None:
        self._used_up = folder / "used-up"
        text = QUOTA.format(flag=str(self._used_up), part=part)
        self.environment = injected(folder / "fault", text)

    def is_used_up(self, yes: bool = True) -> None:
        self._used_up.touch() if yes else self._used_up.unlink()


@pytest.fixture
def quota(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quota]:
    return lambda part: Quota(tmp_path_factory.mktemp("quota"), part)


def starts_without(start: Start, quota: Quota) -> Ended:
    quota.is_used_up()
    options = ("--log-file", start.folder / "log", "--control", start.folder / "control")
    return start(
        *options,
        f"unix:{start.folder}/s?mode=0600",
        *("--", *MINIMAL),
        environment=quota.environment,
    )


@pytest.mark.parametrize("part", ["/pid", "/log", "/s"])
def test_a_start_above_a_users_quota_is_refused_in_one_line_and_leaves_nothing(
    start: Start, quota: Callable[[str], Quota], part: str
) -> None:
    ended = starts_without(start, quota(part))

    assert ended.status == 111, ended
    (line,) = ended.lines
    assert f"{part}" in line
    assert "Disk quota exceeded; free space there, or choose another disk" in line
    assert start.left() == []


@pytest.mark.parametrize(
    ("part", "what"),
    [("/control", "no control socket"), ("notify", "no private folder for the workers' notify")],
)
def test_what_only_operators_miss_is_named_in_one_line_and_it_serves(
    start: Start, quota: Callable[[str], Quota], part: str, what: str
) -> None:
    ended = starts_without(start, quota(part))

    assert ended.status == 0, ended
    (line,) = ended.lines
    assert what in line
    assert "Disk quota exceeded" in line
    assert ask(f"{start.folder}/s")
    start.stop()


@pytest.mark.costly
def test_above_a_users_quota_a_reload_fails_and_a_later_one_does_not(
    protector: Callable[..., Protector], quota: Callable[[str], Quota], tmp_path: Path
) -> None:
    """Each generation has a socket file of its own."""
    files, path = quota(".sp-"), tmp_path / "socket"
    words = ("--handoff", "listener", "--ready", "notify", f"unix:{path}", "--", *worker("accepts"))
    daemon = protector(*words, **files.environment).ready()
    before = ask(str(path))
    files.is_used_up()

    mark = daemon.signal(signal.SIGHUP)

    line = daemon.log.wait_for("event=reload-failed ", after=mark)
    assert "Disk quota exceeded" in line
    assert ask(str(path)) == before
    files.is_used_up(False)
    daemon.reload()
    assert ask(str(path)) != before
    daemon.stop()
