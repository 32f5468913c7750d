"""The library's log lines, in programs with logging and without."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from socketprotector_client.log import Logger

WITHOUT = """
import sys
from socketprotector_client.log import Logger
log = Logger("socketprotector_client.x")
log.debug("unseen %d", 1)
log.warning("late by %d s", 2)
log.error("cannot accept: %s", "EMFILE")
try:
    [][3]
except IndexError:
    log.exception("handler failed")
assert "logging" not in sys.modules
"""


def run(code: str) -> list[str]:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")
    return ended.stderr.splitlines()


def test_without_logging_a_warning_and_worse_is_on_stderr() -> None:
    late, cannot, failed, *traceback = run(WITHOUT)

    assert [late, cannot, failed] == ["late by 2 s", "cannot accept: EMFILE", "handler failed"]
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "IndexError: list index out of range"


def test_unconfigured_logging_writes_the_same() -> None:
    with_logging = "import logging\n" + WITHOUT.replace("assert", "assert True or")

    assert [line for line in run(with_logging) if "File" not in line] == [
        line for line in run(WITHOUT) if "File" not in line
    ]


def test_a_closed_stderr_ends_no_worker() -> None:
    code = "import os, sys; os.close(2)\n" + WITHOUT
    code += "\nsys.stderr = None"  # otherwise CPython exits with 120 for what it cannot write

    assert run(code) == []


def test_a_program_that_has_loaded_logging_gets_each_line_from_where_it_was_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    log = Logger("socketprotector_client.x")
    log.debug("one")
    log.warning("two")
    log.error("three")
    try:
        raise KeyError("k")
    except KeyError:
        log.exception("four %d", 4)

    assert [each.getMessage() for each in caplog.records] == ["one", "two", "three", "four 4"]
    assert {(each.name, each.filename) for each in caplog.records} == {
        ("socketprotector_client.x", "test_log.py")
    }
    assert caplog.records[-1].exc_info
