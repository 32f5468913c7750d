"""Help, versions and checks that cannot be written to stdout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.running import COMMAND, DEADLINE_S, ROOT

WORDS = {
    "help": (*COMMAND, "--help"),
    "help-all": (*COMMAND, "--help-all"),
    "version": (*COMMAND, "--version"),
    "check": (*COMMAND, "-f", "--check", "127.0.0.1:0", "--", "true"),
    "demo": (*COMMAND, "demo", "--help"),
    "exporter": (sys.executable, "-m", "socketprotector_exporter", "--help"),
    "exporter-version": (sys.executable, "-m", "socketprotector_exporter", "--version"),
    "run": (sys.executable, "-m", "socketprotector_client.run", "--help"),
}


def run(words: tuple[str, ...], stdout: int) -> tuple[int, list[str]]:
    """Return the exit status, and the lines on stderr."""
    # With this variable nothing stays in a buffer, so an answer fails earlier than for most users.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        words,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=DEADLINE_S,
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("case", WORDS)
def test_an_answer_for_a_full_disk_fails_with_one_line(case: str) -> None:
    with open("/dev/full", "wb") as full:
        status, lines = run(WORDS[case], full.fileno())

    assert (status, len(lines)) == (111, 1), lines
    assert lines[0].endswith(": cannot write to stdout: No space left on device")


@pytest.mark.parametrize("case", WORDS)
def test_an_answer_without_a_reader_is_silent(case: str) -> None:
    receive, send = os.pipe()
    os.close(receive)
    with open(send, "wb") as lost:
        assert run(WORDS[case], lost.fileno()) == (0, [])
