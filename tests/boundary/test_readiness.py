"""A check that says ready: run again until it succeeds, killed and run again where it hangs."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from socketprotector.model.records import Program
from socketprotector.system import readiness
from socketprotector.system.loop import Loop
from socketprotector.system.process import Process, spawn
from socketprotector.system.readiness import Readiness, check_program, program_of
from tests.boundary.ending import settle
from tests.running import DEADLINE_S, wait_gone

pytestmark = pytest.mark.usefixtures("in_root_directory")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks hang after less, and are asked again sooner."""
    monkeypatch.setattr(readiness, "CHECK_LIMIT_S", 0.2)
    monkeypatch.setattr(readiness, "CHECK_EVERY_S", 0.01)


class Checked:
    """A worker's readiness, and what it has reported."""

    def __init__(self, loop: Loop, command: str) -> None:
        self._loop = loop
        self.program = Program(
            path="/bin/sh",
            argv=("sh",),
            directory="/",
            environment=(("PATH", os.environ["PATH"]),),
            umask=0o022,
            limits=(),
            nice=0,
            ready="check",
            ready_check=command,
        )
        self.readiness = Readiness(self.program, {}, loop, 1)
        self.ready: list[str] = []
        self.hangs: list[str] = []

    def watch(self, checked: Callable[[], Process], *, until_hangs: bool = False) -> None:
        """Run the loop until it is ready, or until a check is reported to hang."""
        loop = self._loop

        def told(list_: list[str], what: str, *, last: bool) -> None:
            list_.append(what)
            if last:
                loop.running = False

        def never() -> None:
            loop.running = False
            raise AssertionError("neither ready nor reported to hang")

        loop.call_after("never", DEADLINE_S, never)
        self.readiness.watch(
            lambda by: told(self.ready, by, last=not until_hangs),
            checked,
            lambda what: told(self.hangs, what, last=until_hangs),
            lambda: None,
        )
        loop.run()
        loop.cancel("never")


def at_end(fd: int) -> bool:
    """Wait for the end of a pipe: of all processes that could write to it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(DEADLINE_S * 1000)) and os.read(fd, 1) == b""


def test_a_timer_that_is_waited_for_again_is_not_put_off(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = replace(Checked(loop, "").program, ready="any", ready_after_s=1.0)
    awaited = Readiness(program, {}, loop, 7)
    awaited.wait()
    [due] = [loop.due(key) for key in loop._timers]
    monkeypatch.setattr("time.monotonic", lambda: 1e12)

    awaited.wait()

    assert [loop.due(key) for key in loop._timers] == [due]
    awaited.close()


@pytest.mark.usefixtures("soon")
def test_a_check_that_hangs_is_killed_with_its_group_and_asked_again_and_reported_once(
    loop: Loop, tmp_path: Path
) -> None:
    answers = tmp_path / "answers"
    checked = Checked(loop, f"test -e {answers} && exit; sleep 1000 & wait")
    receive, send = os.pipe()
    tries: list[int] = []

    def check() -> Process:
        if len(tries) == 3:
            answers.touch()
        process = spawn(check_program(checked.program), {}, {5: send})
        tries.append(process.pid)
        return process

    checked.watch(check)

    os.close(send)
    assert at_end(receive), "a process of a check lives on"
    assert (checked.ready, checked.hangs) == (["check"], ["test"])
    assert len(tries) >= 4
    settle(loop)
    assert wait_gone(tries) == []
    checked.readiness.close()
    os.close(receive)


@pytest.mark.usefixtures("soon")
def test_what_a_check_leaves_in_the_background_ends_with_it(loop: Loop, tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    checked = Checked(loop, f"sleep 1000 & test -e {answers}")
    receive, send = os.pipe()
    tries: list[int] = []

    def check() -> Process:
        if len(tries) == 3:
            answers.touch()
        process = spawn(check_program(checked.program), {}, {5: send})
        tries.append(process.pid)
        return process

    checked.watch(check)

    os.close(send)
    assert at_end(receive), "a process of a check lives on"
    assert (checked.ready, len(tries)) == (["check"], 4)
    checked.readiness.close()
    os.close(receive)


def test_a_check_that_has_ended_in_time_does_not_hang_however_late_that_is_seen(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "CHECK_LIMIT_S", 0.0)
    checked = Checked(loop, "true")
    tries: list[int] = []

    def check() -> Process:
        process = spawn(check_program(checked.program), {}, {})
        tries.append(process.pid)
        poll = select.poll()
        poll.register(process.pidfd, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000)
        return process

    checked.watch(check)

    assert (checked.ready, checked.hangs, len(tries)) == (["check"], [], 1)
    checked.readiness.close()


@pytest.mark.usefixtures("soon")
def test_a_check_that_hangs_ends_with_its_worker(loop: Loop) -> None:
    checked = Checked(loop, "exec sleep 1000")
    tries: list[Process] = []

    def check() -> Process:
        tries.append(spawn(check_program(checked.program), {}, {}))
        return tries[-1]

    checked.watch(check, until_hangs=True)
    checked.readiness.close()

    settle(loop)
    assert not any(os.path.exists(f"/proc/{each.pid}") for each in tries)
    assert loop.due(("check", 1)) is None


@pytest.mark.usefixtures("soon")
def test_one_that_we_may_not_kill_any_more_is_reported_and_left(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sudo, which becomes another user's in the place of the shell."""
    checked = Checked(loop, "exec sudo -u postgres pg_isready")
    process = spawn(check_program(Checked(loop, "exec sleep 1000").program), {}, {})

    def may_not(self: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(Process, "kill_group", may_not)
        checked.watch(lambda: process, until_hangs=True)
        checked.readiness.close()

    assert checked.hangs == ["sudo"]
    os.kill(process.pid, 9)
    settle(loop)


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("curl -fsS http://user:secret@localhost/ready", "curl"),
        ("/usr/local/bin/check-it --token=secret", "check-it"),
        ("./a.out", "a.out"),
        ("true", "true"),
        ("true;echo secret", "true"),
        ("PGPASSWORD=secret psql -c 'select 1'", "psql"),
        ("exec pg_isready -q", "pg_isready"),
        ("A=1 B='se cret' C=\"se cret\" /bin/psql secret", "psql"),
        # Here only the shell knows.
        ("PASSWORD=secret", "sh"),
        ("A=$(cat secret) psql", "sh"),
        ('A="$(cat secret)" psql', "sh"),
        ("A=se\\ cret psql", "sh"),
        ("'se cret' now", "sh"),
        ("-secret", "sh"),
        ("$SECRET/psql", "sh"),
        ("secret$SECRET", "sh"),
        ("secret=", "sh"),
        ("secret() { true; }", "sh"),
        ("(secret)", "sh"),
        ("", "sh"),
    ],
)
def test_only_the_program_of_a_check_is_reported(command: str, program: str) -> None:
    assert program_of(command) == program
