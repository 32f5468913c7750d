"""The pid file: whole or not there, held by one, replaced when it is stale."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading

import pytest

from tests.procfs import name_of
from tests.running import MARK, ask, eventually, marked, wait_gone
from tests.scenarios.starting import MINIMAL, Start


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("mode", ["detached", "foreground"])
def test_it_holds_the_pid_of_the_protector_and_goes_with_it(start: Start, mode: str) -> None:
    if mode == "foreground":
        with start.popen("-f", "--pid-file", "pid", "unix:s", "--", *MINIMAL) as process:
            assert process.stderr
            while "event=ready" not in process.stderr.readline():
                pass
            assert start.pid_file.read_text() == f"{process.pid}\n"
            process.send_signal(signal.SIGTERM)
            process.communicate()
    else:
        start.up("unix:s", "--", *MINIMAL)
        assert name_of(start.pid) == "SocketProtector"
        assert start.pid_file.stat().st_mode & 0o777 == 0o644
        start.stop()
    assert start.left() == []


def test_one_that_a_living_protector_holds_is_respected(start: Start) -> None:
    start.up("unix:s", "--", *MINIMAL)
    before = start.pid

    ended = start("unix:other", "--", *MINIMAL)

    assert ended.status == 100
    assert ended.lines == [
        f"SocketProtector: the pid file {start.pid_file} is held by process {before}; "
        "stop or reload that one"
    ]
    assert start.pid == before
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()
    assert start.left() == []


def test_it_is_held_until_the_last_words_of_its_worker_are_written(start: Start) -> None:
    """What a worker has left has the relay's pipe, so a stop waits for a while."""
    leaves = "trap '' HUP; setsid sleep 1000 & echo $! >left; exec \"$@\""
    start.up("unix:s", "--", "/bin/sh", "-c", leaves, "sh", *MINIMAL)
    left = int((start.folder / "left").read_text())
    pid = start.pid
    try:
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: "event=stopped" in start.log_file.read_text(), "its last line")
        os.kill(pid, signal.SIGSTOP)  # otherwise it waits for 3 s
        ended = start("unix:other", "--", *MINIMAL)
    finally:
        os.kill(left, signal.SIGKILL)
        os.kill(pid, signal.SIGCONT)
    assert ended.status == 100, ended
    wait_gone([pid])
    (start.folder / "left").unlink()
    assert start.left() == []


@pytest.mark.parametrize("mode", [(), ("--check",)], ids=["start", "check"])
@pytest.mark.parametrize("named", ["dead", "another program"])
def test_one_that_another_program_has_locked_is_no_protectors(
    start: Start, named: str, mode: tuple[str, ...]
) -> None:
    """Any user can lock a file that was left behind, being able to read it."""
    with subprocess.Popen(["sleep", "1000"]) as other:
        pid = other.pid if named == "another program" else dead_pid()
        start.pid_file.write_text(f"{pid}\n")
        with start.pid_file.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)

            ended = start(*mode, "unix:s?mode=0600", "--", *MINIMAL)
        other.kill()

    assert ended.status == 111, ended
    [line] = ended.lines
    assert f"the pid file {start.pid_file} is locked, but not by process {pid}" in line
    assert f"`fuser {start.pid_file}`" in line


@pytest.mark.parametrize(
    "content",
    [f"{dead_pid()}\n", f"{os.getpid()}\n", "1\n", ""],
    ids=["dead", "another program's", "init's", "empty"],
)
def test_a_stale_one_is_replaced(start: Start, content: str) -> None:
    start.pid_file.write_text(content)

    start.up("unix:s", "--", *MINIMAL)

    assert name_of(start.pid) == "SocketProtector"
    start.stop()
    assert start.left() == []


def test_another_processs_pid_file_in_our_place_is_not_removed(start: Start) -> None:
    start.up("unix:s", "--", *MINIMAL)
    pid = start.pid
    start.pid_file.unlink()
    start.pid_file.write_text("1\n")

    os.kill(pid, signal.SIGTERM)
    assert not wait_gone([pid])

    assert start.pid_file.read_text() == "1\n"
    start.pid_file.unlink()


def test_the_rest_of_a_writer_that_was_killed_is_not_in_the_way(start: Start) -> None:
    """In a container the same pid comes again: the temporary file has its number."""
    words = ("unix:s", "--", *MINIMAL)
    first = start.popen("-f", "--pid-file", "pid", *words, before=("sh", "-c", PLANT, "-"))
    with first as process:
        assert process.stderr
        while "event=ready" not in process.stderr.readline():
            pass
        assert start.pid_file.read_text() == f"{process.pid}\n"
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert start.left() == []


PLANT = 'echo rest > "pid.$$"; exec "$@"'


@pytest.mark.costly
@pytest.mark.parametrize("stale", [None, f"{dead_pid()}\n", ""], ids=["none", "dead", "empty"])
def test_of_eight_starters_at_once_exactly_one_wins(start: Start, stale: str | None) -> None:
    if stale is not None:
        start.pid_file.write_text(stale)
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                seen.add(start.pid_file.read_text())
            except FileNotFoundError:
                pass

    watcher = threading.Thread(target=look)
    watcher.start()
    words = ("--pid-file", "pid", "--log-file", "log")
    starters = [start.popen(*words, f"unix:s{n}?mode=0600", "--", *MINIMAL) for n in range(8)]
    results = [(each.communicate(timeout=60)[1], each.returncode) for each in starters]
    done.set()
    watcher.join()

    assert sorted(status for _, status in results) == [0, *[100] * 7], results
    winner = start.pid
    held = f"the pid file {start.pid_file} is held by process {winner}; stop or reload that one"
    assert {err for err, status in results if status} == {f"SocketProtector: {held}\n"}
    assert seen - {stale} == {f"{winner}\n"}, "whole, or not there"
    served = [n for n in range(8) if (start.folder / f"s{n}").exists()]
    assert [ask(f"{start.folder}/s{n}") for n in served] == ["hello"]
    start.stop()
    eventually(lambda: not marked(start.environment[MARK]), "the end of all")
    assert start.left() == []


@pytest.mark.costly
def test_a_failed_start_leaves_none(start: Start) -> None:
    ended = start("unix:s", "--", "false")

    assert ended.status == 3
    assert start.left() == []
