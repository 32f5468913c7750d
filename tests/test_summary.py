"""What a run says at its end: failed tests with reasons, skips by need, pytest's last line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests import summary
from tests.running import ROOT

TESTS = """
import pytest
def test_wrong():
    print("said meanwhile")
    assert [] == ["a log", "of many lines"], "what was wrong\\n" + "a line of a log\\n" * 99
@pytest.fixture
def broken():
    raise OSError("cannot set up")
def test_never_begun(broken): pass
def test_skipped(): pytest.skip("needs root")
@pytest.mark.parametrize("n", range(3))
def test_skipped_for_a_detail(n): pytest.skip(f"needs mounts: {n}")
def test_good(): pass
"""


def test_the_summary_fits_on_a_screen_and_the_logs_are_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    words = ("-p", "tests.conftest", "--shared-world", "-q", "--logs-in", "logs/failed")
    command = (sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"))

    done = subprocess.run(
        [*command, "--rootdir", tmp_path, *words, "test_it.py"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines()[-9:] == [
        "==================== 2 failed: the logs are in logs/failed =====================",
        "FAILED test_it.py::test_wrong",
        "    AssertionError: what was wrong",
        "ERROR test_it.py::test_never_begun",
        "    OSError: cannot set up",
        "=============================== not checked here ===============================",
        "NOT CHECKED: 3 tests need mounts",
        "NOT CHECKED: 1 test needs root",
        done.stdout.splitlines()[-1],
    ], done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 failed, 1 passed, 4 skipped, 1 error in ")
    assert "a line of a log" not in done.stdout
    log = (tmp_path / "logs" / "failed").read_text()
    assert log.count("a line of a log") == 99 + TESTS.count("a line of a log")
    assert "said meanwhile" in log
    assert "OSError: cannot set up" in log


def report(nodeid: str, message: str) -> Any:
    crash = SimpleNamespace(message=message)
    return SimpleNamespace(nodeid=nodeid, longrepr=SimpleNamespace(reprcrash=crash))


def test_of_many_failures_the_first_are_named_and_the_others_counted() -> None:
    reports = [("FAILED", report(f"test_{n}", f"{n} " + "x" * 999)) for n in range(40)]

    lines = list(summary.failed_lines(reports))

    assert len(lines) == 2 * summary.NAMED + 1
    assert max(map(len, lines)) < 160
    assert lines[-1] == "and 25 more"


def test_of_many_failures_for_one_reason_the_first_is_named() -> None:
    reports = [("FAILED", report(f"test_{n}", "no room")) for n in range(40)]

    lines = list(summary.failed_lines([*reports, ("ERROR", report("test_x", "other"))]))

    assert lines == [
        "FAILED test_0",
        "    no room  (and 39 more with this reason)",
        "ERROR test_x",
        "    other",
    ]


def test_of_a_file_that_cannot_be_collected_the_error_is_the_reason() -> None:
    text = "tests/x.py:1: in <module>\n    import y\nE   ModuleNotFoundError: No module named 'y'\n"

    assert summary.reason_of(SimpleNamespace(longrepr=text)) == (
        "E   ModuleNotFoundError: No module named 'y'"
    )
