"""The end of a worker to which the system refuses a thread (RLIMIT_NPROC, pids.max)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from socketprotector_client.drain_state import Drain
from socketprotector_client.exit_after_drain import DrainExit
from socketprotector_client.intake import Intake

from .sharing import taken


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse each thread, as Thread.start does after a failed clone(2)."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.fixture
def terms() -> Iterator[list[int]]:
    """Return the list of the SIGTERMs that this process has got."""
    found: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def drain() -> Iterator[Drain]:
    drain = Drain(())
    yield drain
    drain.after_fork_in_child()  # closes its pipe, which otherwise lives as long as the process


def test_a_callback_without_a_thread_is_refused_and_the_drain_ends(
    drain: Drain, monkeypatch: pytest.MonkeyPatch, refused: None
) -> None:
    called: list[str] = []
    with pytest.raises(RuntimeError, match="can't start new thread"):
        drain.on_begin(lambda: called.append("refused"))
    monkeypatch.undo()
    drain.on_begin(lambda: called.append("accepted"))

    drain.begin()
    drain.finish()

    assert called == ["accepted"]


def test_a_drain_whose_only_callback_was_refused_waits_for_none(
    drain: Drain, refused: None
) -> None:
    with pytest.raises(RuntimeError):
        drain.on_begin(print)

    drain.begin()

    drain.finish()  # raises, if it joins a thread that has never begun


def test_a_server_gets_its_signal_without_a_thread_that_waits_for_requests(
    intake: Intake, terms: list[int], refused: None, caplog: pytest.LogCaptureFixture
) -> None:
    with taken(intake):
        DrainExit(intake).begin()

    assert terms == [signal.SIGTERM]
    assert caplog.messages == ["cannot wait for the last requests: the system refuses a thread"]


def test_a_server_in_a_thread_interrupts_the_main_thread_without_a_timer(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: signals.append(number))
    ended = in_a_thread(lambda: refuse_then(monkeypatch, DrainExit(intake)._exit))

    assert (ended, signals) == ([0], [signal.SIGINT])


def refuse_then(monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    end()


def in_a_thread(work: Callable[[], None]) -> list[object]:
    """Run this in a thread and return the code of its SystemExit."""
    codes: list[object] = []

    def run() -> None:
        try:
            work()
        except SystemExit as end:
            codes.append(end.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return codes
