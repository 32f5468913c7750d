"""`SocketProtector demo`: what it tells, that it is what README's picture shows, and what stays."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.recording import of_cast, words_of
from tests.running import COMMAND, DEADLINE_S, ROOT, Lines, mark

DEMO = (*COMMAND, "demo")
CAST = ROOT / "docs" / "images" / "demo.cast"
#: What is said of clients that a killed process held, if it held any.
TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where it makes its files; at the end none is left.  Short, as a socket's path has to be."""
    with tempfile.TemporaryDirectory(prefix="sp-") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)
        assert not [*Path(name).iterdir()]


def test_it_tells_what_the_picture_shows_and_nothing_fails(
    folder: Path, marked_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [*DEMO, "--pause", "100ms"],
        env={**os.environ, **marked_environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "\x1b" not in done.stdout
    assert re.search(
        r"^[\d,]+ connections, 0 failed(, \d+ cut by our kill -9)?$", done.stdout, re.M
    )
    assert words_of(done.stdout) == words_of(of_cast(CAST))


@pytest.mark.costly
def test_it_fits_a_terminal_and_control_c_ends_all_of_it(
    folder: Path, marked_environment: dict[str, str]
) -> None:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*DEMO, "--pause", "5m"],
        env={**os.environ, **marked_environment, "TERM": "xterm-256color"},
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    shown = Lines(ours)
    try:
        shown.wait_for(r"clients connect all the time")
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does

        assert process.wait(DEADLINE_S) == 130, shown.text()
    finally:
        process.kill()
        process.wait()
    assert "interrupted" in shown.text()
    for line in shown.seen:
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line)
        assert max(map(len, text.rstrip("\r").split("\r"))) <= 80, line


@pytest.mark.costly
def test_what_it_started_ends_with_it_when_it_is_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="sp-") as folder, mark() as environment:
        ours, its = os.pipe()
        process = subprocess.Popen(
            [*DEMO, "--pause", "5m"],
            env={**os.environ, **environment, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=its,
            stderr=its,
        )
        os.close(its)
        shown = Lines(ours)
        try:
            shown.wait_for(r"clients connect all the time")
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pause", "soon"], "'soon' is no duration; write 500ms, 10s, 1h30m or seconds"),
        (["--", "./daemon"], "unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str) -> None:
    done = subprocess.run([*DEMO, *words], capture_output=True, text=True, timeout=DEADLINE_S)

    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
