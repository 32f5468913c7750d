"""Output that cannot be written: help, versions and checks to stdout, errors to stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


CTL = (sys.executable, "-m", "socketprotector.ctl")
RUN = (sys.executable, "-m", "socketprotector_client.run")
EXPORTER = (sys.executable, "-m", "socketprotector_exporter")
#: Commands that fail, each with its exit status.
FAILING = {
    "start": ((*COMMAND, "--bogus"), 2),
    "demo": ((*COMMAND, "demo", "--bogus"), 2),
    "ctl": ((*CTL, "--bogus"), 2),
    "ctl-without-protector": ((*CTL, "--name", "nosuch", "status"), 1),
    "exporter": ((*EXPORTER, "--all", "--name", "web"), 2),
    "run": ((*RUN, "nosuch:app", "--bind", "127.0.0.1:0"), 2),
    "run-broken-application": ((*RUN, "broken:app", "--bind", "127.0.0.1:0"), 1),
}


def run(words: tuple[str, ...], stdout: int) -> tuple[int, list[str]]:
    """Return the exit status, and the lines on stderr."""
    done = subprocess.run(
        words,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
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


@pytest.mark.parametrize("case", FAILING)
@pytest.mark.parametrize("lost", ["reader", "disk"])
def test_a_failure_keeps_its_exit_status_without_stderr(
    case: str, lost: str, tmp_path: Path
) -> None:
    words, expected = FAILING[case]
    (tmp_path / "broken.py").write_text("raise RuntimeError\n")
    receive, send = os.pipe()
    os.close(receive)
    if lost == "disk":
        os.close(send)
        send = os.open("/dev/full", os.O_WRONLY)
    with open(send, "wb") as stderr:
        done = subprocess.run(words, stderr=stderr, cwd=tmp_path, timeout=DEADLINE_S)

    assert done.returncode == expected
