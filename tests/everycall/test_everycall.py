"""Faults at single system calls: those that once failed, and a part of `make everycall`."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.c.building import installed
from tests.everycall.life import KILL, OPERATIONS, Life, build
from tests.everycall.trials import FIXED, found_sites, kept_outcomes, trials, try_one
from tests.running import DEADLINE_S, MARK, ROOT, eventually

#: Of each operation, `make test-all` tries so many: 300 in all.
EACH = -(-300 // len(OPERATIONS))
#: Gets 500 signals during its calls; its handler in C writes each signal's number to a pipe.
SIGNALLED = """
import os, signal
seen = 0
def count(*_):
    global seen
    seen += 1
_, write_end = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
signal.signal(signal.SIGALRM, count)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
while seen < 500:
    os.stat("/")
signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.fixture(autouse=True)
def _compiler() -> None:
    installed("gcc")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("operation", "place", "code"), FIXED)
def test_a_fault_that_once_did_harm(tmp_path: Path, operation: str, place: str, code: int) -> None:
    sites = found_sites(tmp_path, [operation])[operation]
    chosen = [site for site in sites if site.startswith(f"{place}:")]
    assert chosen

    outcomes = [try_one(tmp_path, (operation, site, code)) for site in chosen]

    assert all(each["fired"] for each in outcomes)
    assert not any(each["problems"] for each in outcomes), outcomes


@pytest.mark.costly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_faults_at_single_calls_do_no_harm(tmp_path: Path, operation: str) -> None:
    drawn = trials(found_sites(tmp_path, [operation]))[:EACH]

    outcomes = [try_one(tmp_path, each) for each in drawn]

    assert sum(each["fired"] for each in outcomes) > EACH // 2
    failed = [each for each in outcomes if each["problems"]]
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize("code", [errno.ENOMEM, KILL])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "start"])
def test_an_order_that_has_no_effect_is_a_problem_unless_something_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    operation = OPERATIONS[name]
    life = Life(tmp_path, tmp_path / "faults.so", operation, f"poll x.py:1 {code}", {MARK: "x"})
    monkeypatch.setattr(Life, "protector", 0)
    (tmp_path / "log").write_text("event=spawned generation=1 pid=0\n")
    (tmp_path / "fired").touch()
    monkeypatch.setattr(Life, "send", lambda *_: None)
    monkeypatch.setattr(Life, "says", lambda *_: False)
    monkeypatch.setattr(Life, "ctl", lambda *_, **__: 0)
    monkeypatch.setattr("tests.everycall.life.marked", lambda _: [1])
    monkeypatch.setattr("tests.everycall.life.wait_gone", lambda *_: [1])
    with life._reserved:
        operation.act(life)

    assert bool(life.problems) == (code != KILL or "deploy" in name)


def test_an_outcome_that_a_killed_run_left_incomplete_is_passed_over(tmp_path: Path) -> None:
    kept = tmp_path / "results.jsonl"
    assert kept_outcomes(kept) == []
    kept.write_text('\n{"fired": true}\n{"fir\n{"fired": false}')
    assert kept_outcomes(kept) == [{"fired": True}, {"fired": False}]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--only", "reload,nosuch"), "--only nosuch: there are start, "),
        (("--minutes", "nan"), "--minutes: write a number from 0"),
        (("--jobs", "0"), "--jobs: write a number from 1"),
        (("--folder", "/proc/x"), "--folder /proc/x: No such file or directory; choose another"),
    ],
)
def test_a_wrong_argument_is_one_line(words: tuple[str, ...], why: str) -> None:
    command = [sys.executable, "-m", "tests.everycall", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"python -m tests.everycall: error: {why}")


@pytest.mark.costly
def test_a_run_that_gets_term_ends_what_it_has_started(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "tests.everycall", "--only", "reload", "--jobs", "2"]
    command += ["--folder", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        eventually(lambda: len([*tmp_path.glob("*/life-*/**/pid")]) == 2, "two lives")

        run.terminate()

        said, _ = run.communicate(timeout=2 * DEADLINE_S)
    assert run.returncode == 130
    assert re.search(r"The lives that run now come to their end\.\n\d+ sites in 1 op", said)


@pytest.mark.costly
def test_a_signal_that_interrupts_a_call_hangs_nothing(tmp_path: Path) -> None:
    """The library once took the interpreter's lock for a call of the signal handler."""
    program = tmp_path / "socketprotector" / "signalled.py"  # its calls count by that folder
    program.parent.mkdir()
    program.write_text(SIGNALLED)
    (tmp_path / "armed").touch()
    preloaded = {"EVERYCALL": str(tmp_path), "LD_PRELOAD": str(build(tmp_path))}

    subprocess.run(
        [sys.executable, program], env={**os.environ, **preloaded}, check=True, timeout=DEADLINE_S
    )

    assert " path\n" in (tmp_path / "sites").read_text()  # os.stat() has counted
