"""Spawning, signalling and reaping one real process; a failure half way leaves nothing."""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from socketprotector.model.settings import Identity
from socketprotector.system import procfs
from socketprotector.system import spawn as spawning
from socketprotector.system.executable import resolve
from socketprotector.system.loop import Loop
from socketprotector.system.privileges import become
from socketprotector.system.process import Process
from socketprotector.system.spawn import in_child, spawn
from tests import needs
from tests.boundary.ending import SHELL, end_of, is_open, running, settle, traced, until
from tests.rounds import rounds
from tests.running import DEADLINE_S, ROOT, eventually
from tests.together import together
from tests.vm.programs import takes_a_number

pytestmark = pytest.mark.usefixtures("in_root_directory")


def output_of(script: str, **given: object) -> str:
    receive, send = os.pipe()
    process = spawn(replace(running(script), **given), {"B": "2"}, {5: send})  # type: ignore[arg-type]
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        text = file.read()
    end_of(process)
    return text


def test_how_a_process_ended_is_known_once_it_has() -> None:
    receive, send = os.pipe()
    process = spawn(running("read line <&5; exit 3"), {}, {5: receive})
    os.close(receive)
    assert (process.reap(), process.has_ended()) == (None, False)

    os.write(send, b"go\n")
    os.close(send)

    assert end_of(process) == (False, "exited with status 3")


def test_an_exit_with_status_0_is_clean_and_a_signal_has_a_name() -> None:
    assert end_of(spawn(running("exit 0"), {}, {})) == (True, "exited with status 0")
    assert end_of(spawn(running("kill -TERM $$"), {}, {}))[1] == "was killed by SIGTERM"


def test_a_process_gets_what_is_said_and_nothing_else() -> None:
    inheritable = {fd for fd in range(3, 256) if is_open(fd) and os.get_inheritable(fd)}
    script = "n=0; while [ $n -lt 99 ]; do [ -e /proc/$$/fd/$n ] && echo $n >&5; n=$((n+1)); done"
    seen = {int(fd) for fd in output_of(script).split()}
    assert seen - inheritable == {0, 1, 2, 5}
    assert output_of("readlink /proc/self/fd/0 >&5") == "/dev/null\n"
    assert output_of("echo $A$B >&5") == "12\n"
    assert output_of("umask >&5; pwd >&5", umask=0o077, directory="/proc") == "0077\n/proc\n"
    assert output_of("ulimit -Sn >&5", limits=(("nofile", 99),)) == "99\n"


@pytest.mark.parametrize("tell_pid", ["", "LISTEN_PID"])
def test_a_process_may_have_fewer_descriptors_than_we_have(tell_pid: str) -> None:
    receive, send = os.pipe()
    held = [os.dup(0) for _ in range(100)]
    try:
        limited = replace(running("ulimit -Sn >&3"), limits=(("nofile", 64),))
        process = spawn(limited, {}, {3: send}, tell_pid)
    finally:
        for fd in (*held, send):
            os.close(fd)
    with open(receive, encoding="utf-8") as file:
        assert file.read() == "64\n"
    end_of(process)


def test_descriptors_may_change_places() -> None:
    receive, send = os.pipe()
    # Each goes to the number that the other has here.
    process = spawn(
        running(f"echo over > /proc/self/fd/{receive}"), {}, {receive: send, send: receive}
    )
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        assert file.read() == "over\n"
    end_of(process)


@together(
    "broken",
    [
        {"path": "/nowhere/at/all"},
        {"path": "/etc/passwd"},
        {"directory": "/nowhere/at/all"},
        {"limits": (("nofile", 1 << 40),)},
        {"environment": (("A", "\0"),)},
    ],
)
def test_a_spawn_that_fails_leaves_and_changes_nothing(broken: dict[str, object]) -> None:
    with pytest.raises((OSError, ValueError)):
        spawn(replace(SHELL, umask=0o077, **broken), {}, {3: 0, 4: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "spare"),
    [
        ({3: 0, 4: 1}, 0),  # the first duplicate fails
        ({3: 0, 4: 1}, 1),  # the second
        ({}, 0),  # the pidfd, when the child runs already
    ],
)
def test_a_spawn_without_free_descriptors_leaves_and_changes_nothing(
    given: dict[int, int], spare: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.dup(0) for _ in range(30)]  # no hole is left below
    room = [os.dup(0) for _ in range(spare)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held + room) + 1, hard))
    for fd in room:
        os.close(fd)
    try:
        with pytest.raises(OSError, match="Too many open files"):
            spawn(running("sleep 1000"), {}, given)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


def test_kill_reaches_the_whole_group() -> None:
    receive, send = os.pipe()
    process = spawn(running("sleep 1000 & echo started >&5; wait"), {}, {5: send})
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        assert file.readline() == "started\n"

        process.kill_group()

        assert file.read() == ""  # the child held it, too
    assert end_of(process)[1] == "was killed by SIGKILL"


@pytest.mark.parametrize("how", ["killed", "executes another", "another user's"])
def test_a_mortal_one_ends_with_its_group_when_we_end_in_whatever_way(how: str) -> None:
    program = running("sleep 1000 & echo started >&5; wait")
    if how == "another user's":
        if os.geteuid() != 0:
            needs.skip("root")
        program = replace(program, identity=Identity("nobody", 65534, 65534, (65534,)))
    receive, send = os.pipe()
    is_told, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            if program.identity is not None:
                become(Identity("games", 5, 60, (60,)), 0, starts_others=True)
            spawn(program, {}, {5: send}, mortal=True)
            os.close(send)
            os.read(is_told, 1)
            os.execv("/bin/sleep", ("sleep", "1000"))
        finally:
            os._exit(1)
    os.close(send)
    os.close(is_told)
    try:
        with open(receive, encoding="utf-8") as file:
            assert file.readline() == "started\n"
            if how == "executes another":
                os.write(tell, b"!")
            else:
                os.kill(parent, signal.SIGKILL)

            assert file.read() == ""
    finally:
        os.close(tell)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)


def test_a_mortal_one_is_reported_like_any_other_and_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    process = spawn(running("exit 3"), {}, {}, mortal=True)

    assert end_of(process) == (False, "exited with status 3")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_signals_to_one_that_has_ended_do_nothing() -> None:
    process = spawn(running("exit 0"), {}, {})
    poll = select.poll()
    poll.register(process.pidfd, select.POLLIN)
    assert poll.poll(30_000)

    assert process.has_ended()
    process.signal(signal.SIGTERM)
    process.kill_group()
    process.reap()
    process.signal(signal.SIGTERM)
    process.kill_group()  # its number may be another's by now
    process.close()


def test_a_status_that_another_process_took_is_asked_for_there() -> None:
    process = spawn(running("exit 3"), {}, {})
    os.waitpid(process.pid, 0)

    with pytest.raises(ChildProcessError):
        process.reap()
    process.close()


@pytest.mark.parametrize("by_another", [False, True])
def test_whether_it_has_ended_is_known_without_a_single_descriptor(by_another: bool) -> None:
    """poll(2) looks at none where the limit is 0, which may be lowered while we run."""
    receive, send = os.pipe()
    process = spawn(running("read line <&5"), {}, {5: receive})
    os.close(receive)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        lived = not process.has_ended()
        os.close(send)
        if by_another:
            os.waitpid(process.pid, 0)
        eventually(process.has_ended, "its end")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert lived
    if not by_another:
        process.reap()
    process.close()


# -- which program ------------------------------------------------------------------------


def test_a_command_is_what_its_symlinks_lead_to_now(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        script = tmp_path / name / "daemon"
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
    (tmp_path / "current").symlink_to("1")

    path, argv = resolve(["./current/daemon", "x"], str(tmp_path), "")

    assert (path, argv) == (str(tmp_path / "1/daemon"), (str(tmp_path / "1/daemon"), "x"))


def test_a_command_without_a_slash_is_found_in_the_path(tmp_path: Path) -> None:
    path, argv = resolve(["sh", "-c", "true"], str(tmp_path), "/nowhere:/bin")

    assert os.path.samefile(path, "/bin/sh")
    assert argv == ("sh", "-c", "true")


def test_what_is_not_there_or_not_executable_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    with pytest.raises(FileNotFoundError):
        resolve(["./nothing"], str(tmp_path), "")
    with pytest.raises(FileNotFoundError):
        resolve(["no-such-command-anywhere"], str(tmp_path), "/bin")
    with pytest.raises(PermissionError):
        resolve(["./text"], str(tmp_path), "")
    with pytest.raises(IsADirectoryError):
        resolve(["./"], str(tmp_path), "")


def test_one_that_does_not_end_when_it_is_killed_holds_nothing_up(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a disk; it is reaped when it ends, and the loop sleeps until then."""
    process = spawn(running("exec sleep 1000"), {}, {})
    with traced(process.pid):
        process.discard()  # returns

        looks = turns = 0
        poll = loop._epoll.poll

        def counted(timeout: float | None = None) -> list[tuple[int, int]]:
            nonlocal turns
            turns += 1
            return poll(timeout)

        def count() -> bool:
            nonlocal looks
            looks += 1
            return looks >= 20

        monkeypatch.setattr(loop, "_epoll", SimpleNamespace(poll=counted))
        until(loop, count)
        monkeypatch.undo()
        assert os.path.exists(f"/proc/{process.pid}")
        assert turns <= 2 * looks
    settle(loop)
    assert not os.path.exists(f"/proc/{process.pid}")


def signals_groups() -> bool:
    """Whether a pidfd leads to its group (Linux 6.9)."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(pidfd, 0, None, 4)
    except OSError as error:
        return error.errno != errno.EINVAL
    finally:
        os.close(pidfd)
    return True


@needs.unless(signals_groups(), "Linux 6.9, which signals groups by descriptor")
def test_a_group_is_killed_by_its_pidfd_not_by_a_number() -> None:
    """One that was adopted is reaped by another process, and its number may be another's then."""
    receive, send = os.pipe()
    process = spawn(running("sleep 1000 & echo started >&5; wait"), {}, {5: send})
    os.close(send)
    adopted = Process(process.pid, os.dup(process.pidfd))
    other = spawn(running("exec sleep 1000"), {}, {})
    with open(receive, encoding="utf-8") as file:
        assert file.readline() == "started\n"
        adopted.pid = other.pid  # as if that number were another's by now
        adopted.kill_group()
        assert file.read() == ""
    assert not other.has_ended()
    adopted.close()
    assert end_of(process)[1] == "was killed by SIGKILL"
    other.kill_group()
    assert end_of(other)[1] == "was killed by SIGKILL"


# -- what a process leaves: its group, and other people's orphans --------------------------


def by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be on Linux before 6.9, where a pidfd does not lead to a group."""
    real = signal.pidfd_send_signal

    def old(fd: int, number: int, siginfo: None = None, flags: int = 0) -> None:
        if flags:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", old)


@pytest.mark.parametrize("kernel", ["6.9", "before"])
def test_what_a_leader_leaves_of_its_group_is_signalled_after_it_was_reaped(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "before":
        by_number(monkeypatch)
    receive, send = os.pipe()
    # The child has the pipe until it ends.
    process = spawn(running("sleep 1000 & exit 0"), {}, {5: send})
    os.close(send)
    poll = select.poll()
    poll.register(process.pidfd, select.POLLIN)
    assert poll.poll(30_000)
    assert process.reap() is not None

    assert process.has_group()
    assert process.signal_group(signal.SIGTERM)

    assert os.read(receive, 1) == b""
    os.close(receive)
    eventually(lambda: not process.has_group(), "the end of the group")
    assert not process.signal_group(signal.SIGTERM)
    process.close()


@needs.ROOT
@pytest.mark.parametrize("kernel", [(), ("before",)], ids=["6.9", "before"])
@pytest.mark.parametrize("reaped_by", ["us", "adopted"])
def test_a_group_that_has_another_ones_number_by_now_is_left_alone(
    kernel: tuple[str, ...], reaped_by: str
) -> None:
    assert takes_a_number.run(reaped_by, *kernel, path=sys.path) == "lived"
    if kernel:
        unasked = takes_a_number.run(reaped_by, "unasked", *kernel, path=sys.path)
        assert unasked == "was killed"


ORPHANS = """
import os, sys
sys.path[:0] = {path!r}
from socketprotector.system.process import Process, reap_orphans
def ended(status):
    pid = os.fork()
    if pid == 0:
        os._exit(status)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid
assert reap_orphans() == (0, False)
strangers = [ended(1)]
known = Process(ended(3))
strangers += [ended(1) for _ in range({strangers})]
assert reap_orphans() == (1, True)
assert reap_orphans() == (0, True)
assert known.reap().how == "exited with status 3"
while reap_orphans()[1]:
    pass
assert reap_orphans() == (0, False)
later = Process(ended(4))
known.pid = later.pid  # as if that number were used again before this one is let go of
known.close()
assert reap_orphans() == (0, True), "reaped as a stranger"
assert later.reap().how == "exited with status 4"
gone, last = ended(1), ended(5)
before = os.pidfd_open(gone)
os.waitpid(gone, 0)
# As if that number had been used again between two programs, and both were adopted now.
first, second = Process(last, before), Process(last, os.pidfd_open(last))
try:
    first.reap()
except ChildProcessError:
    first.close()
assert reap_orphans() == (0, True), "reaped as a stranger"
assert second.reap().how == "exited with status 5"
assert reap_orphans() == (0, False)
assert not [pid for pid in strangers if os.path.exists(f"/proc/{{pid}}")]
"""


def test_unknown_children_are_reaped_and_those_with_an_owner_are_left_to_it() -> None:
    """In a process of its own: this one has children that pytest knows."""
    code = ORPHANS.format(path=sys.path, strangers=rounds(300, 1000))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


MEMORY = """
import select, sys
from dataclasses import replace
from socketprotector.system import procfs
from socketprotector.system import spawn as spawning
from socketprotector.system.process import Process
from socketprotector.system.spawn import in_child, spawn
from tests.boundary.ending import running

def peak(process):
    select.select([process.pidfd], [], [])
    return process.reap().max_rss_kib

ours = procfs.peak_kib()
use_more = replace(
    running(""), path=sys.executable, argv=("python", "-IS", "-c", f"b'x' * ({2 * ours} << 10)")
)
small, large = peak(spawn(running("exit 3"), {}, {})), peak(spawn(use_more, {}, {}))
assert small is None, small
assert 2 * ours < large < 4 * ours, (ours, large)
if sys.argv[1:]:  # as the next program in our process, which is smaller
    process = spawn(running("exit 3"), {}, {})
    adopted = Process(process.pid, process.pidfd)
    procfs.peak_kib = lambda: 1
    assert peak(adopted) is None
"""


@pytest.mark.parametrize("how", [(), ("adopted",)], ids=["own", "adopted"])
def test_the_memory_of_a_process_is_never_what_we_had_before_its_exec(how: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-c", MEMORY, *how], cwd=ROOT, timeout=DEADLINE_S, check=True)


@together(
    ("ours_kib", "peak_kib", "known"),
    [
        (10_240, 10_000, None),
        (10_240, 11_264, None),
        (10_240, 11_265, 11_265),
        (11_264, 11_265, None),
        (11_264, 12_288, None),
        (11_264, 12_289, 12_289),
    ],
)
def test_a_peak_is_known_if_it_is_clearly_above_ours(
    monkeypatch: pytest.MonkeyPatch, ours_kib: int, peak_kib: int, known: int | None
) -> None:
    """The kernel's count has an error of up to 1 MiB."""
    process = spawn(running(":"), {}, {})
    eventually(process.has_ended, "its end")
    used = SimpleNamespace(ru_utime=0.0, ru_stime=0.0, ru_maxrss=peak_kib)
    wait4 = os.wait4
    monkeypatch.setattr(procfs, "peak_kib", lambda: ours_kib)
    monkeypatch.setattr(os, "wait4", lambda *asked: (*wait4(*asked)[:2], used))

    ended = process.reap()

    assert ended is not None
    assert ended.max_rss_kib == known
    process.close()


# -- in_child() ------------------------------------------------------------------


def test_a_child_answers_with_what_its_call_returns() -> None:
    long = bytes(range(256)) * 8192  # more than a pipe holds

    assert in_child(lambda: long) == long
    assert in_child(lambda: b"") == b""


def test_an_error_of_a_child_is_raised_here() -> None:
    def refuse() -> bytes:
        raise ValueError("\udcff is no text")

    with pytest.raises(IsADirectoryError) as caught:
        in_child(Path("/etc").read_bytes)
    assert caught.value.filename == "/etc"
    with pytest.raises(ValueError, match="\udcff is no text"):
        in_child(refuse)


def test_a_child_has_none_of_our_descriptors() -> None:
    with Path("/etc/passwd").open("rb") as file:

        def remaining() -> bytes:
            places = (f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd"))
            return "\n".join(os.readlink(each) for each in places if os.path.lexists(each)).encode()

        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == "/etc/passwd"
        assert re.fullmatch(r"pipe:\[\d+\]", in_child(remaining).decode())


@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGSTOP, errno.ETIMEDOUT), (signal.SIGKILL, errno.EIO)],
    ids=["stopped", "killed"],
)
def test_a_child_that_does_not_answer_is_killed_and_reported(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, why: int
) -> None:
    if number is signal.SIGSTOP:
        monkeypatch.setattr(spawning, "_ANSWER_S", 0.2)

    def answer() -> bytes:
        os.kill(os.getpid(), number)
        return b"too late"

    with pytest.raises(OSError, match=r"answer|killed") as caught:
        in_child(answer)

    assert caught.value.errno == why
