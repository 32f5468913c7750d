"""A command that checks: how it ended and its last line are the reason; no more is heard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from socketprotector.model.text import in_units
from socketprotector.system import check_command
from socketprotector.system.check_command import CheckCommand, first_program
from socketprotector.system.loop import Loop
from socketprotector.system.polling import read_now
from tests.boundary.ending import SHELL, settle
from tests.running import DEADLINE_S, wait_gone
from tests.together import together

pytestmark = pytest.mark.usefixtures("in_root_directory")

PROGRAM = replace(SHELL, environment=(("PATH", os.environ["PATH"]),))


class Run:
    """One run of one, until it is over or late."""

    def __init__(self, loop: Loop, command: str, limit_s: float = 60.0, stdin: bytes = b"") -> None:
        self._loop = loop
        self.said: list[str] = []
        self.late: list[str] = []
        self.command = CheckCommand(
            loop,
            PROGRAM,
            command,
            {"SHOWN": "what we add"},
            ended=lambda why: self._ends(self.said, why),
            late=lambda why: self._ends(self.late, why),
            limit_s=limit_s,
            stdin=stdin,
        )
        assert self.command._process is not None
        self.pid = self.command._process.pid

    def _ends(self, list_: list[str], why: str) -> None:
        list_.append(why)
        self._loop.running = False

    def wait(self) -> str:
        """Run the loop; return what it said at last."""
        self._loop.call_after("never", DEADLINE_S, lambda: self._ends(self.late, "never"))
        self._loop.running = True
        self._loop.run()
        self._loop.cancel("never")
        return (self.said or self.late)[-1]


@pytest.fixture(autouse=True)
def nothing_is_left(loop: Loop) -> Iterator[None]:
    before = {*os.listdir("/proc/self/fd")}
    yield
    settle(loop)
    assert {*os.listdir("/proc/self/fd")} <= before


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("true", ""),
        ("echo all is well", ""),
        ("exit 3", "exit: exited with status 3"),
        ("kill -9 $$", "kill: was killed by SIGKILL"),
        ("echo one; echo two >&2; echo; false", "echo: exited with status 1: two"),
        (
            "printf 'a\\033[2Jb\\nevent=forged\\r\\n'; false",
            "printf: exited with status 1: event=forged",
        ),
        ("printf 'a\\033b'; false", r"printf: exited with status 1: a\x1bb"),
        ("printf '\\377'; false", "printf: exited with status 1: \N{REPLACEMENT CHARACTER}"),
        (
            "seq -s , 1000; false",
            f"seq: exited with status 1: {','.join(map(str, range(1, 1001)))[:200]}",
        ),
        ('echo "$SHOWN"; false', "echo: exited with status 1: what we add"),
        ("cat; false", "cat: exited with status 1"),
    ],
)
def test_how_it_ends_is_what_it_says(
    loop: Loop, capfd: pytest.CaptureFixture[str], command: str, why: str
) -> None:
    run = Run(loop, command)

    assert run.wait() == why

    assert run.late == []
    assert capfd.readouterr() == ("", ""), "that would be in the log"


def test_it_reads_what_it_is_told(loop: Loop) -> None:
    assert Run(loop, "cat; false", stdin=b"{}").wait() == "cat: exited with status 1: {}"


def test_however_much_it_writes_it_does_not_wait_for_us(loop: Loop) -> None:
    assert Run(loop, "yes | head -c 1000000; echo over; false").wait().endswith("status 1: over")


def test_one_that_writes_without_end_takes_little_of_our_time(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []

    def counted(*arguments: object) -> bytes | None:
        found = read_now(os.read, *arguments[1:])
        reads.append(len(found or b""))
        return found

    monkeypatch.setattr(check_command, "read_now", counted)
    limit_s = 0.1
    while len(reads) < 2:  # on a busy machine `yes` may not have written yet
        reads.clear()
        limit_s *= 2
        began = time.monotonic()
        run = Run(loop, "yes", limit_s)

        assert run.wait() == f"yes: no answer within {in_units(limit_s)}"
        run.command.close()

    assert len(reads) < 5 + (time.monotonic() - began) / check_command._READ_EVERY_S
    assert len(run.command._tail) <= check_command._KEPT_BYTES
    assert wait_gone([run.pid]) == []


def test_what_goes_on_writing_elsewhere_does_not_keep_us(loop: Loop) -> None:
    assert Run(loop, "setsid yes & exit 4").wait().startswith("setsid: exited with status 4")


def test_one_that_is_late_is_killed_and_its_end_says_why(loop: Loop) -> None:
    run = Run(loop, "sleep 1000", 0.05)
    assert run.wait() == "sleep: no answer within 50ms"

    run.wait()

    assert (run.late, run.said) == (["sleep: no answer within 50ms"],) * 2
    assert wait_gone([run.pid]) == []


def test_closed_it_ends_and_nothing_is_said(loop: Loop) -> None:
    run = Run(loop, "sleep 1000")

    run.command.close()
    run.command.close()

    settle(loop)
    assert wait_gone([run.pid]) == []
    assert (run.said, run.late) == ([], [])


def test_one_that_cannot_be_started_leaves_nothing(loop: Loop) -> None:
    with pytest.raises(ValueError, match="null"):
        CheckCommand(
            *(loop, PROGRAM, "true", {"A": "\0"}),
            ended=lambda _: None,
            late=lambda _: None,
            limit_s=1.0,
        )


@together(
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
        ("exec >&- ; secret", "sh"),
        ("secret=", "sh"),
        ("secret() { true; }", "sh"),
        ("(secret)", "sh"),
        ("", "sh"),
    ],
)
def test_only_the_program_of_a_check_is_reported(command: str, program: str) -> None:
    assert first_program(command) == program
