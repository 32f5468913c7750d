"""The comparison with rivals: its report, and a run of one rival."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.processes import ROOT, descendants
from bench.rivals import report
from bench.rivals.catalogue import RIVALS
from bench.rivals.report import Note, Results
from bench.rivals.running import steps
from bench.rivals.situations import SITUATIONS
from tests import needs
from tests.procfs import command_line_of
from tests.running import DEADLINE_S, eventually, wait_gone
from tests.together import together

PROGRAM = (sys.executable, "-m", "bench.rivals.programs.worker")


def seen(failed: int = 0, connections: int = 1000, **more: Any) -> dict[str, Any]:
    kinds = dict.fromkeys(report.KINDS, 0)
    kinds["refused"] = failed
    return {**kinds, "connections": connections, "failed": failed, "gap_us": 1000.0, **more}


def note(rival: str, situation: str = "reload", turn: int = 0, **more: Any) -> Note:
    return Note(rival, situation, turn, seen(**more))


@together("name", list(RIVALS))
def test_each_entry_is_complete(name: str) -> None:
    rival = RIVALS[name]
    texts = dict.fromkeys(
        (
            "port",
            "path",
            "unix",
            "folder",
            "release",
            "number",
            "status",
            "word",
            "broken",
            "python",
        ),
        "1",
    ) | dict.fromkeys(("scripts", "tools", "worker", "programs", "built", "root"), "1")

    for text in (rival.command, rival.at_path, rival.version, *rival.files.values()):
        text.format(**texts)  # raises KeyError where it names what there is not
    steps((*rival.reload, *rival.upgrade))
    assert rival.command or rival.fronted
    assert rival.manual
    assert rival.source
    assert set(rival.without) <= SITUATIONS.keys()


def test_steps_name_signals_and_what_an_operator_does() -> None:
    assert steps(("USR2", "answers", "old TERM", "run a b")) == [
        ("signal", "USR2"),
        ("answers", ""),
        ("old", "TERM"),
        ("run", "a b"),
    ]


def test_a_step_that_there_is_not_is_an_error() -> None:
    with pytest.raises(KeyError):
        steps(("HOP",))


def test_turns_are_there_and_back() -> None:
    assert report.order(["a", "b"], 2) == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_a_second_run_skips_what_is_done_and_not_what_has_failed() -> None:
    whole, bad = note("nginx"), Note("nginx", "first", 0, {}, "never answered")
    lines = [whole.line(), bad.line(), whole.line()[:20]]

    notes = report.read(lines)

    assert notes == [whole, bad]
    assert report.done(notes) == {("nginx", "reload", 0)}


def test_each_turn_that_could_not_be_measured_is_listed() -> None:
    notes = [note("nginx", "worker", 0), Note("nginx", "worker", 1, {}, "a worker answered")]

    (line,) = report.errors(Results(notes), ["nginx"])
    assert line == "nginx, a worker killed with a full queue, C=64: a worker answered"

    again = [*notes, note("nginx", "worker", 1)]  # a second run has measured it
    assert report.errors(Results(again), ["nginx"]) == []


def test_failures_are_counted_by_kind_over_all_turns() -> None:
    results = Results([note("nginx", turn=0, failed=2), note("nginx", turn=1, failed=1)])

    assert report.failed(results, "nginx", "reload") == "3 of 2,003: 3 refused"


def test_a_ratio_is_of_the_turns_that_both_had() -> None:
    results = Results(
        [
            note("direct", "short", 0, per_second=100.0),
            note("direct", "short", 1, per_second=400.0),
            note("nginx", "short", 0, per_second=50.0),
            note("nginx", "short", 1, per_second=100.0),
            note("nginx", "short", 2, per_second=1.0),
        ]
    )

    assert results.ratio("nginx", "short", "per_second") == pytest.approx(0.375)


def test_the_best_rivals_fail_least_then_have_the_shortest_gaps_and_are_not_ours() -> None:
    names = ["circus", "puma", "nginx", "uvicorn", "granian", "ours-listener", "direct"]
    failed = {"circus": 1, "puma": 0, "nginx": 0, "uvicorn": 5, "granian": 9}
    gaps = {"puma": 9000.0, "nginx": 2000.0}
    notes = [
        Note(name, "reload", 0, seen(failed.get(name, 0)) | {"gap_us": gaps.get(name, 1.0)})
        for name in names
    ]

    assert report.best(Results(notes), names) == ["nginx", "puma", "circus", "uvicorn"]


def test_where_a_rival_is_better_is_said_with_both_figures() -> None:
    notes = [note("nginx", failed=0), note("ours-listener", failed=10)]

    (line,) = report.better(Results(notes), ["nginx", "ours-listener"])

    assert "failed: nginx 0.000 %; ours: ours-listener 0.990 %" in line


def test_a_rate_is_compared_with_the_same_worker_only() -> None:
    notes = [
        note("ours-listener", "short", per_second=100.0),
        note("nginx", "short", per_second=900.0),
        note("server-starter", "short", per_second=200.0),
    ]

    (line,) = report.better(Results(notes), ["ours-listener", "nginx", "server-starter"])

    assert "server-starter" in line
    assert "nginx" not in line


def test_a_longer_gap_than_the_best_rivals_is_missed() -> None:
    notes = [
        Note("nginx", "reload", 0, seen() | {"gap_us": 20_000.0}),
        Note("puma", "reload", 0, seen() | {"gap_us": 90_000.0}),
        Note("ours-listener", "reload", 0, seen() | {"gap_us": 30_000.0}),
    ]

    ((_, text, verdict),) = report.gaps(Results(notes), ["nginx", "puma", "ours-listener"])

    assert verdict == "**missed**"
    assert text == "ours-listener 30.0 (30.0) against 20.0 (20.0) of nginx"


def test_gaps_are_compared_by_their_median_and_shown_with_the_longest() -> None:
    names = ["nginx", "ours-listener"]
    gaps = {"nginx": (20_000.0, 22_000.0, 90_000.0), "ours-listener": (1e3, 23_000.0, 99_000.0)}
    notes = [
        Note(name, "broken", turn, seen() | {"gap_us": gap, "p999_us": 1e3})
        for name, found in gaps.items()
        for turn, gap in enumerate(found)
    ]

    ((_, text, verdict),) = report.gaps(Results(notes), names)
    assert text == "ours-listener 23.0 (99.0) against 22.0 (90.0) of nginx"
    assert verdict == "holds"
    assert "| 0 of 3,000; 23.0 (99.0); 1.0 |" in report.chosen(Results(notes), names)


def test_the_modes_that_meet_a_target_are_named() -> None:
    names = ["nginx", "ours-listener", "ours-listener-rolling"]
    gaps = dict(zip(names, (20_000.0, 30_000.0, 20_900.0), strict=True))
    notes = [Note(name, "reload", 0, seen() | {"gap_us": gap}) for name, gap in gaps.items()]

    ((_, _, verdict),) = report.gaps(Results(notes), names)
    assert verdict == "**missed**; holds for ours-listener-rolling"

    ((_, _, verdict),) = report.gaps(Results(notes), ["nginx", "ours-listener-rolling"])
    assert verdict == "holds"


def test_workers_in_c_and_the_least_supervisor_are_shown_and_not_compared() -> None:
    names = ["least", "nginx", "ours-c", "ours-listener"]
    gaps = dict(zip(names, (9_000.0, 20_000.0, 10_000.0, 30_000.0), strict=True))
    notes = [Note(name, "reload", 0, seen() | {"gap_us": gap}) for name, gap in gaps.items()]

    ((_, text, verdict),) = report.gaps(Results(notes), names)
    ours, least, c = "ours-listener 30.0 (30.0)", "least 9.0 (9.0)", "ours-c 10.0 (10.0)"
    assert text == f"{ours}, {least}, {c} against 20.0 (20.0) of nginx"
    assert verdict == "**missed**"

    assert report.gaps(Results(notes), ["nginx", "ours-c"]) == []
    assert report.best(Results(notes), names) == ["nginx"]

    (line,) = report.better(Results(notes), names)
    assert line.endswith("longest gap, median: nginx 20.0 ms; ours: ours-listener 30.0 ms")


def test_one_that_cannot_be_run_is_listed_with_the_command_that_failed() -> None:
    assert "| `apt-get x`: no |" in report.not_run({"puma": "`apt-get x`: no"})


@pytest.mark.costly
def test_one_row_is_measured_and_printed(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        needs.skip("cc")
    turn = ("--only", "short", "--turns", "1", "--round", "0.2", "--kept", str(tmp_path))
    command = [sys.executable, "-m", "bench.rivals", "ours-listener", *turn]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "ours-listener: 0 failed" in done.stderr
    assert re.search(r"^\| ours-listener \|.*\| - \| - \|", done.stdout, re.MULTILINE)
    (kept,) = tmp_path.iterdir()
    assert len(report.read(kept.read_text().splitlines())) == 1


def test_a_retiring_worker_ends_when_its_return_line_ends(tmp_path: Path) -> None:
    release, address = tmp_path / "release", str(tmp_path / "notify")
    release.write_text("good 1")
    line, theirs = socket.socketpair()
    with (
        line,
        theirs,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        notified.bind(address)
        notified.settimeout(DEADLINE_S)
        process = subprocess.Popen(
            [*PROGRAM, f"retiring:{listener.fileno()}"],
            cwd=ROOT,
            env={
                **os.environ,
                "RELEASE": str(release),
                "NOTIFY_SOCKET": address,
                "SOCKETPROTECTOR_RETURN": str(theirs.fileno()),
            },
            pass_fds=(listener.fileno(), theirs.fileno()),
        )
        try:
            theirs.close()
            assert notified.recv(100).splitlines() == [b"READY=1", b"X_SOCKETPROTECTOR_RETIRE=1"]
            with socket.create_connection(listener.getsockname(), DEADLINE_S) as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert b"pong" in client.recv(4096)
                line.close()
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


@pytest.mark.costly
def test_a_run_that_gets_term_ends_what_it_has_started(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        needs.skip("cc")
    options = ("--only", "reload", "--round", "600", "--kept", str(tmp_path))
    command = [sys.executable, "-m", "bench.rivals", "ours-listener", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        eventually(lambda: any(map(is_a_worker, descendants(run.pid))), "a worker")
        started = descendants(run.pid)

        run.terminate()

        _, last = run.communicate(timeout=DEADLINE_S)
    assert (run.returncode, last.splitlines()[-1]) == (
        130,
        "Interrupted; the same command goes on from here.",
    )
    assert not wait_gone(started)


def is_a_worker(pid: int) -> bool:
    return "bench.rivals.programs.worker" in command_line_of(pid)


@together("written", ["", "{", '{"rival": 1}', "7"])
def test_a_result_that_a_killed_run_left_incomplete_is_passed_over(written: str) -> None:
    whole = note("nginx")
    assert report.read([whole.line(), written, whole.line()]) == [whole, whole]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("nosuch",), "nosuch: there are direct, "),
        (("--round", "0"), "--round 0: write seconds from 0.1 to 600"),
        (("--round", "nan"), "--round nan: write seconds from 0.1 to 600"),
        (("--hours", "nan"), "--hours nan: write a number from 0"),
        (("--turns", "0"), "--turns 0: write a number from 1"),
        (("--kept", "/proc/x"), "--kept /proc/x: No such file or directory; choose another"),
    ],
)
def test_a_wrong_argument_is_one_line(words: tuple[str, ...], why: str) -> None:
    command = [sys.executable, "-m", "bench.rivals", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"python -m bench.rivals: error: {why}")
