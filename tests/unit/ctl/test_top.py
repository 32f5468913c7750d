"""top on a terminal of 80 x 24."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import termios
import threading
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from socketprotector.ctl.top import _RECONNECT_S, Rates, draw
from tests import forked
from tests.running import DEADLINE_S, eventually
from tests.unit.ctl.conftest import COMMAND
from tests.unit.ctl.fake import Fake, Message, awaited, generation, rolling, status, worker


class Terminal:
    """A command on a terminal, and what it has drawn."""

    def __init__(self, *arguments: str, kind: str = "xterm") -> None:
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = forked.popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**environment, "TERM": kind},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                return
            if not data:
                return
            self.shown += data.decode("utf-8", "replace")

    def wait(self) -> int:
        """Wait for its end, and until all that it has drawn is read; return its status."""
        status = self.process.wait(DEADLINE_S)
        self._thread.join(DEADLINE_S)
        return status

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join()
        os.close(self.fd)


def test_a_terminal_that_can_only_write_lines_is_refused(fake: Fake) -> None:
    terminal = Terminal("top", kind="dumb")
    try:
        assert terminal.wait() == 2
        assert "top: needs a terminal; use status, or top --json" in terminal.shown
    finally:
        terminal.end()


@pytest.fixture
def top(fake: Fake) -> Iterator[Terminal]:
    generations = [
        generation(number, "draining", worker(number, 4700 + number)) for number in range(1, 40)
    ]
    fake.status = status(*generations, generation(40, "serving", worker(40, status="x" * 300)))
    made = Terminal("top", "--interval", "50ms")
    yield made
    made.end()


def test_q_ends_and_gives_the_screen_back(fake: Fake, top: Terminal) -> None:
    def more() -> bool:
        fake.status["forwarded"] += 100
        fake.status["now"] += 1
        return "100/s" in top.shown

    eventually(more, "a rate")
    os.write(top.fd, b"q")

    assert top.wait() == 0
    assert top.shown.rstrip().endswith("\x1b[?25h") or "\x1b[?1049l" in top.shown


def test_ctrl_c_ends_too(top: Terminal) -> None:
    eventually(lambda: "web: " in re.sub(r"\x1b\[[0-9;]*m", "", top.shown), "the first screen")
    top.process.send_signal(signal.SIGINT)

    assert top.wait() == 130
    assert "\x1b[?1049l" in top.shown


def test_ctrl_z_gives_the_screen_back_until_the_process_continues(top: Terminal) -> None:
    """The kernel stops no process whose session has no other: it continues at once."""
    eventually(lambda: "web" in top.shown, "a screen")
    assert termios.tcgetattr(top.fd)[6][termios.VSUSP] == b"\0"
    os.write(top.fd, b"\x1a")
    eventually(lambda: top.shown.count("\x1b[?1049h") == 2, "the screen again")
    assert top.shown.count("\x1b[?1049l") == top.shown.count("\x1b[?25h") == 1
    os.write(top.fd, b"q")

    assert top.wait() == 0
    assert top.shown.count("\x1b[?1049l") == 2


def test_no_line_is_wider_and_no_screen_higher_than_the_terminal(top: Terminal) -> None:
    eventually(lambda: top.shown.count("web") > 2, "a screen")
    os.write(top.fd, b"q")
    top.wait()

    screens = re.split(r"\x1b\[H", top.shown)[1:]
    assert screens
    for screen in screens:
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen).split("\r\n")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80


def test_a_busy_generation_fits_into_80_columns() -> None:
    waits = {"count": 1, "p50": 1_023, "p99": 1_048_575, "buckets": []}
    busy = generation(1234, "draining", worker(1), accepted=12_345_678, active=4_321, wait_us=waits)
    console = Console(width=80, file=io.StringIO())
    console.print(draw(status(busy), {}, Rates(), 80, 24))

    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12,345,678" in shown
    assert "\u2026" not in shown


def test_a_rollout_is_a_line_and_a_column_that_fits_into_80_columns() -> None:
    waits = {"count": 1, "p50": 1_023, "p99": 1_048_575, "buckets": []}
    old, new = (
        generation(number, phase, worker(number), accepted=1_234_567, wait_us=waits)
        for number, phase in ((8, "serving"), (9, "settling"))
    )
    shares = status(old, new, route=8, rollout=rolling(awaited(5, 2, 240.9), share=33.33))
    console = Console(width=80, file=io.StringIO())
    console.print(draw(shares, {}, Rates(), 80, 24))

    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rollout: 3 of 8 workers replaced, waiting for worker 5 (2 connections, longest" in shown
    assert re.search(r"9 settling 33\.33% .* 1,234,567 ", shown)
    assert "\u2026" not in shown


def test_a_cut_is_survived(fake: Fake, top: Terminal) -> None:
    eventually(lambda: "web" in top.shown, "a screen")
    fake.cut_all()
    before = len(fake.commands())
    eventually(lambda: len(fake.commands()) > before + 2, "asked again")

    assert top.process.poll() is None
    os.write(top.fd, b"q")
    assert top.wait() == 0


def test_a_cut_is_survived_although_answers_are_slower_than_a_connection_may_be(
    fake: Fake, top: Terminal
) -> None:
    eventually(lambda: "web" in top.shown, "a screen")

    def answer(*_: object) -> Message:
        time.sleep(_RECONNECT_S + 0.2)
        return fake.status

    fake.answers["status"] = answer
    fake.cut_all()
    fake.status["name"] = "after"
    eventually(lambda: "after" in top.shown, "a screen after the cut")

    assert "no answer" not in top.shown
    os.write(top.fd, b"q")
    assert top.wait() == 0


def test_why_nothing_is_shown_after_the_end_stays_there_and_keys_are_read(
    fake: Fake, top: Terminal
) -> None:
    eventually(lambda: "web" in top.shown, "a screen")
    fake.end()
    eventually(lambda: len(re.findall(r"did\s+not\s+come\s+back", top.shown)) > 2, "three tries")
    os.write(top.fd, b"q")

    assert top.wait() == 0
    assert "Bad file descriptor" not in top.shown


def test_rates_and_waits_are_those_of_the_interval() -> None:
    rates = Rates()
    for second, forwarded, buckets in ((0, 100, [5, 0, 0]), (2, 300, [5, 98, 2]), (3, 300, [0])):
        waits = {"count": 0, "p50": 0, "p99": 0, "buckets": buckets}
        rates.on_status(
            status(generation(1, wait_us=waits), now=100.0 + second, forwarded=forwarded)
        )
        if second == 2:
            assert (rates.per_second, rates.p50_us, rates.p99_us) == (100.0, 1.0, 3.0)

    assert list(rates.history) == [100.0, 0.0]
    assert rates.p50_us is None
    draw({}, {}, rates, 80, 24)


def test_where_connections_are_not_counted_there_is_no_rate() -> None:
    rates = Rates()
    for second in (0, 1, 2):
        rates.on_status(status(now=100.0 + second, forwarded=None, lost=None))
    console = Console(file=io.StringIO(), width=100)

    console.print(draw(status(forwarded=None, lost=None), {}, rates, 100, 24))

    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^-/s .* forwarded -  lost -$", shown, re.MULTILINE), shown
    assert re.search(r"most -/s$", shown, re.MULTILINE), shown
