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
from socketprotector.system.check_command import CheckCommand
from socketprotector.system.loop import Loop
from socketprotector.system.process import Process
from socketprotector.system.readiness import Readiness
from tests.boundary.ending import settle
from tests.running import DEADLINE_S, wait_gone

pytestmark = pytest.mark.usefixtures("in_root_directory")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are asked again sooner."""
    monkeypatch.setattr(readiness, "CHECK_EVERY_S", 0.01)


class Checked:
    """A worker's readiness, and what it has reported."""

    def __init__(self, loop: Loop, command: str, limit_s: float = 0.2) -> None:
        self._loop, self._limit_s = loop, limit_s
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
        self.fails: list[str] = []
        self.pids: list[int] = []
        self.before_each: Callable[[], None] = lambda: None

    def start(self, over: Callable[[str], None], late: Callable[[str], None]) -> CheckCommand:
        self.before_each()
        check = CheckCommand(
            self._loop,
            self.program,
            self.program.ready_check,
            {},
            ended=over,
            late=late,
            limit_s=self._limit_s,
        )
        assert check._process is not None
        self.pids.append(check._process.pid)
        return check

    def watch(self, *, until_hangs: bool = False) -> None:
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
            self.start,
            lambda what: told(self.hangs, what, last=until_hangs),
            self.fails.append,
            lambda: None,
        )
        loop.run()
        loop.cancel("never")


class Lives:
    """A FIFO that each process of a check has open, as long as it lives."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lives"
        os.mkfifo(self.path)
        self._read = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def wait(self) -> None:
        """Wait for the end of all of them."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000)
        assert os.read(self._read, 1) == b"", "a process of a check lives on"
        os.close(self._read)


def test_a_timer_that_is_waited_for_again_is_not_put_off(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = replace(Checked(loop, "").program, ready="any", ready_after_s=1.0)
    awaited = Readiness(program, {}, loop, 7)
    awaited.start_timer()
    [due] = [loop.due(key) for key in loop._timers]
    monkeypatch.setattr("time.monotonic", lambda: 1e12)

    awaited.start_timer()

    assert [loop.due(key) for key in loop._timers] == [due]
    awaited.close()


def test_a_check_that_hangs_is_killed_with_its_group_and_asked_again_and_reported_once(
    loop: Loop, tmp_path: Path
) -> None:
    lives, answers = Lives(tmp_path), tmp_path / "answers"
    checked = Checked(loop, f"test -e {answers} && exit; exec 5>{lives.path}; sleep 1000 & wait")
    checked.before_each = lambda: answers.touch() if len(checked.pids) == 3 else None

    checked.watch()

    lives.wait()
    assert checked.ready == ["check"]
    assert checked.hangs == ["test: no answer within 200ms"]
    assert checked.fails == []  # that was said
    assert len(checked.pids) >= 4
    settle(loop)
    assert wait_gone(checked.pids) == []
    checked.readiness.close()


def test_what_a_check_leaves_in_the_background_ends_with_it(loop: Loop, tmp_path: Path) -> None:
    lives, answers = Lives(tmp_path), tmp_path / "answers"
    checked = Checked(loop, f"exec 5>{lives.path}; sleep 1000 & test -e {answers}", 60.0)
    checked.before_each = lambda: answers.touch() if len(checked.pids) == 3 else None

    checked.watch()

    lives.wait()
    assert (checked.ready, len(checked.pids)) == (["check"], 4)
    checked.readiness.close()


def test_a_check_that_has_ended_in_time_does_not_hang_however_late_that_is_seen(
    loop: Loop,
) -> None:
    checked = Checked(loop, "true", 0.0)

    def ended(over: Callable[[str], None], late: Callable[[str], None]) -> CheckCommand:
        check = Checked.start(checked, over, late)
        assert check._process is not None
        poll = select.poll()
        poll.register(check._process.pidfd, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000)
        return check

    checked.start = ended  # type: ignore[method-assign]

    checked.watch()

    assert (checked.ready, checked.hangs, len(checked.pids)) == (["check"], [], 1)
    checked.readiness.close()


def test_a_check_that_hangs_ends_with_its_worker(loop: Loop) -> None:
    checked = Checked(loop, "exec sleep 1000")

    checked.watch(until_hangs=True)
    checked.readiness.close()

    settle(loop)
    assert wait_gone(checked.pids) == []
    assert loop.due(("check", 1)) is None


def test_one_that_we_may_not_kill_any_more_is_reported_and_left(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sudo, which becomes another user's in the place of the shell."""
    checked = Checked(loop, "exec sleep 1000")

    def may_not(self: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(Process, "kill_group", may_not)
        checked.watch(until_hangs=True)
        checked.readiness.close()

    assert checked.hangs == ["sleep: no answer within 200ms"]
    settle(loop)
    assert wait_gone(checked.pids) == []  # by its lifeline: it is our own user's


def test_why_a_check_fails_is_said_once_and_the_last_reason_is_kept(
    loop: Loop, tmp_path: Path
) -> None:
    tries = tmp_path / "tries"
    command = f"echo >>{tries}; n=$(wc -l <{tries}); echo try $n; exit $((n < 4))"
    checked = Checked(loop, command, 60.0)
    last: list[str] = []
    checked.before_each = lambda: last.append(checked.readiness.last)

    checked.watch()

    assert checked.fails == ["echo: exited with status 1: try 1"]
    assert last == ["", *(f"echo: exited with status 1: try {n}" for n in (1, 2, 3))]
    assert checked.ready == ["check"]
    checked.readiness.close()
