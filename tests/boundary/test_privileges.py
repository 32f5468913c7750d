"""Becoming another user, in forked children that say what came of it; only as root."""

from __future__ import annotations

import errno
import json
import os
import pwd
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.model.records import Program
from socketprotector.model.settings import Identity
from socketprotector.system import privileges
from socketprotector.system.spawn import spawn
from tests import needs
from tests.boundary.ending import SHELL, children, end_of, is_open, running

pytestmark = [
    pytest.mark.usefixtures("in_root_directory"),
    needs.ANOTHER_USER,
]
KEPT = "00000000000000e0"
NONE = "0000000000000000"


def identity(user: str) -> Identity:
    entry = pwd.getpwnam(user)
    groups = tuple(os.getgrouplist(user, entry.pw_gid))
    return Identity(user, entry.pw_uid, entry.pw_gid, groups)


A, B = identity("games"), identity("nobody")


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def in_a_child(act: Callable[[], object]) -> dict[str, str]:
    """Do something that cannot be undone, in a process of its own; return its status then.

    Raises AssertionError with what was raised there.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            try:
                act()
                said = status()
            except BaseException as error:
                said = {"error": f"{type(error).__name__}: {error}"}
            os.write(send, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    found: dict[str, str] = json.loads(text)
    assert "error" not in found, found["error"]
    return found


def keep_three() -> None:
    privileges.become(A, 0, starts_others=True)


def test_a_user_without_others_to_start_has_nothing_left() -> None:
    found = in_a_child(lambda: privileges.become(A, 0, starts_others=False))

    assert set(found["Uid"].split()) == {str(A.uid)}
    assert set(found["Gid"].split()) == {str(A.gid)}
    assert {found[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {NONE}


@pytest.mark.parametrize("starts_others", [False, True])
def test_capabilities_go_even_where_a_change_of_the_user_keeps_them(starts_others: bool) -> None:
    """As in a container with SECBIT_NO_SETUID_FIXUP, and with one that is inherited."""

    def become() -> None:
        privileges._prctl(28, 1 << 2)  # PR_SET_SECUREBITS
        some = (*privileges.KEPT, 8)  # CAP_SETPCAP
        privileges._set_capabilities(some, inheritable=some)
        privileges._prctl(privileges._PR_CAP_AMBIENT, 2, privileges.KEPT[0])
        privileges.become(A, 0, starts_others=starts_others)
        if starts_others:
            privileges.reclaim()

    found = in_a_child(become)

    assert found["CapPrm"] == found["CapEff"] == (KEPT if starts_others else NONE)
    assert [found[name] for name in ("CapInh", "CapAmb")] == [NONE] * 2


def test_a_process_that_starts_others_keeps_three_and_passes_none_on() -> None:
    found = in_a_child(keep_three)

    assert [found[name] for name in ("CapPrm", "CapEff", "CapBnd")] == [KEPT] * 3
    assert [found[name] for name in ("CapInh", "CapAmb")] == [NONE] * 2


def test_to_become_it_once_more_changes_nothing() -> None:
    """A program that was started by an upgrade does."""

    def twice() -> None:
        keep_three()
        keep_three()

    assert in_a_child(twice)["CapPrm"] == KEPT


def test_root_itself_may_keep_no_more_either_and_that_twice() -> None:
    def twice() -> None:
        for _ in range(2):
            privileges.become(identity("root"), 0, starts_others=True)

    found = in_a_child(twice)

    assert [found[name] for name in ("CapPrm", "CapEff", "CapBnd")] == [KEPT] * 3


def test_what_is_lent_is_taken_back() -> None:
    seen: list[dict[str, str]] = []

    def lend() -> None:
        keep_three()
        with privileges.lent():
            seen.append(status())
        assert [seen[0][name] for name in ("CapInh", "CapAmb")] == [KEPT] * 2

    found = in_a_child(lend)

    assert [found[name] for name in ("CapPrm", "CapInh", "CapAmb")] == [KEPT, NONE, NONE]


def test_a_process_that_became_a_worker_user_can_do_nothing() -> None:
    def become() -> None:
        keep_three()
        privileges.become_worker_user(B)
        for uid in (0, A.uid):
            with pytest.raises(PermissionError):
                os.setuid(uid)
        with pytest.raises(PermissionError):
            os.setgroups([0])
        with pytest.raises(PermissionError):
            os.kill(os.getppid(), 0)  # not CONT: within a session any user may send that

    found = in_a_child(become)

    assert set(found["Uid"].split()) == {str(B.uid)}
    assert {found[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {NONE}


def test_without_the_right_the_reason_is_reported() -> None:
    def without() -> None:
        privileges.become(B, 0, starts_others=False)
        privileges.become(A, 0, starts_others=False)

    with pytest.raises(AssertionError, match="cannot become games: Operation not permitted"):
        in_a_child(without)


def test_no_new_privileges_stays() -> None:
    assert in_a_child(privileges.no_new_privileges)["NoNewPrivs"] == "1"


# -- spawning as another user ----------------------------------------------------


def theirs(program: Program) -> Program:
    return Program(
        program.path,
        program.argv,
        "/",
        program.environment,
        program.umask,
        program.limits,
        program.nice,
        B,
    )


def test_it_is_started_as_that_user_with_what_was_given() -> None:
    receive, send = os.pipe()
    script = 'echo "$(id -u) $(id -g) $A $B $0 $(umask)" >&5'
    process = spawn(theirs(running(script)), {"B": "2"}, {5: send})
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        words = file.read().split()

    assert end_of(process) == (True, "exited with status 0")
    assert words == [str(B.uid), str(B.gid), "1", "2", "sh", "0022"]


@pytest.mark.parametrize(
    ("path", "number"),
    [("/no/such/program", errno.ENOENT), ("/etc/shadow", errno.EACCES), ("/etc", errno.EACCES)],
)
def test_what_cannot_be_executed_is_said_and_nothing_is_left(path: str, number: int) -> None:
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=path) as caught:
        spawn(theirs(Program(path, ("x",), "/", (), 0o022, (), 0)), {}, {})

    assert caught.value.errno == number
    assert set(os.listdir("/proc/self/fd")) == before
    assert children() == set()


def test_signals_begin_with_their_defaults_and_none_is_blocked() -> None:
    receive, send = os.pipe()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        process = spawn(theirs(running("grep Sig /proc/self/status >&5")), {}, {5: send})
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR1, before)
    os.close(send)
    with open(receive, encoding="utf-8") as file:
        found = dict(line.split() for line in file if line.startswith(("SigBlk", "SigIgn")))
    end_of(process)

    assert found["SigBlk:"] == NONE
    # Signals 32 and 33 are the C library's own: a process that it has spawned has them ignored.
    assert int(found["SigIgn:"], 16) & ~(3 << 31) == 0
    assert is_open(0)
    assert SHELL.identity is None
