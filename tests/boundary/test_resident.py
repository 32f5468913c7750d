"""How the resident process ends on an error: for the next program, or for good."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from socketprotector.daemon import assembly, resident
from socketprotector.daemon.start_report import StartReport
from socketprotector.model.settings import Settings, dump
from socketprotector.system import inherited
from socketprotector.system.state_file import NewerStateError, StateError
from tests.running import DEADLINE_S

pytestmark = pytest.mark.usefixtures("in_root_directory", "_signals")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAULT = LookupError("a fault of ours")


@pytest.fixture
def _signals() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Failing:
    """Stands for Resident: supervise() fails."""

    def __init__(self, error: Exception, *, adopts: bool, has_next: bool = True) -> None:
        self.error = error
        self.is_resumable, self.is_adopting = has_next, adopts
        self.parents = SimpleNamespace(store=SimpleNamespace(keeps=has_next))
        self.ended: list[object] = []

    def supervise(self) -> int:
        raise self.error

    def fail(self, reason: str) -> None:
        self.ended.append(reason)

    def finish(self, status: int) -> None:
        self.ended.append(status)


def run(patch: pytest.MonkeyPatch, failing: Failing, **more: int) -> int:
    """Run it with the settings of a first start.  more: descriptors."""
    patch.setattr(resident, "Resident", lambda *_: failing)
    patch.setattr(resident, "_name_process", lambda: None)
    fd = os.memfd_create("settings")
    try:
        os.write(fd, dump(Settings(name="web", command=("x",), directory="/")))
        return resident.run({inherited.SETTINGS: fd, **more}, ("socketprotector",))
    finally:
        os.close(fd)


def test_what_the_system_lacks_to_resume_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The guard or systemd tries again; a traceback at each try would hide the cause."""
    failing = Failing(NO_SPACE, adopts=True)

    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, failing)

    assert ended.value.code == 1
    assert capfd.readouterr().err == "SocketProtector: cannot resume: No space left on device\n"
    assert failing.ended == []


def test_a_guard_gets_the_reason_for_its_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file's name need not be UTF-8, and may be long."""
    failing = Failing(OSError(errno.ENOSPC, "\udcff" + "x" * 5000), adopts=True)
    line, guards = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    guards.settimeout(DEADLINE_S)

    with line, guards:
        with pytest.raises(SystemExit):
            run(monkeypatch, failing, **{inherited.GUARD: line.fileno()})
        reason = guards.recv(10_000)

    assert reason.startswith(rb"X_FAILED=cannot resume: \udcffxxx")
    assert len(reason) < 600
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("error", "adopts"), [(FAULT, True), (FAULT, False), (NO_SPACE, False)])
def test_an_unforeseen_error_has_a_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, adopts: bool
) -> None:
    failing = Failing(error, adopts=adopts)

    with pytest.raises(type(error)) as raised:
        run(monkeypatch, failing)

    assert raised.value is error
    assert failing.ended == []


def test_without_a_next_program_an_error_ends_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = Failing(NO_SPACE, adopts=False, has_next=False)

    assert run(monkeypatch, first) == 111
    assert first.ended == ["cannot start: No space left on device", 111]
    assert capfd.readouterr().err == ""

    faulty = Failing(FAULT, adopts=False, has_next=False)
    assert run(monkeypatch, faulty) == 111
    assert faulty.ended == ["a fault of ours", 111]
    assert "LookupError: a fault of ours" in capfd.readouterr().err


def test_a_state_that_no_program_can_resume_is_said_and_ends_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = Failing(StateError("damaged"), adopts=False, has_next=False)

    assert run(monkeypatch, failing) == 111

    assert capfd.readouterr().err == "SocketProtector: cannot resume: damaged\n"
    assert failing.ended == ["damaged", 111]


@pytest.mark.parametrize(
    ("error", "reports_to", "next_resumes"),
    [
        (NewerStateError("newer"), "nobody", True),
        (NewerStateError("newer"), "launcher", False),
        (NewerStateError("newer"), "terminal", False),
        (StateError("damaged"), "nobody", False),
    ],
)
def test_only_a_newer_state_of_a_finished_start_is_left_to_the_next_program(
    error: StateError, reports_to: str, next_resumes: bool
) -> None:
    launcher, terminal = socket.socketpair()
    with launcher, terminal:
        report = StartReport(
            launcher.detach() if reports_to == "launcher" else None,
            terminal.detach() if reports_to == "terminal" else None,
        )
        one = SimpleNamespace(earlier=error, start_report=report, is_resumable=False)

        with pytest.raises(StateError):
            assembly.Resident._snapshot_to_resume(one)  # type: ignore[arg-type]

        assert one.is_resumable is next_resumes
        report.started()  # closes its descriptors
