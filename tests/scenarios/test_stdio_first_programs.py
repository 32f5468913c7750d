"""--handoff stdio: a release whose first programs fail early."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.procfs import children_of, running
from tests.running import DEADLINE_S, Client, ask, eventually
from tests.scenarios.adopting import kill_protector, protector_pid, revived
from tests.scenarios.operating import Operated, Operating
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import Release

GOOD = "#!/bin/sh\nread line; echo $line\n"
BROKEN = "#!/bin/sh\necho oh dear >&2; exit 7\n"


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "program")
    made.write(GOOD)
    return made


def serving(operated: Operating, release: Release, *options: str) -> Operated:
    one = operated("--log-prefix", "--handoff", "stdio", *options, command=(str(release.path),))
    assert ask(one.address, "hello") == "hello"
    return one


def in_vain(one: Operated) -> None:
    """A client whose program fails: it gets nothing."""
    with socket.create_connection(one.address, DEADLINE_S) as client:
        client.sendall(b"hello\n")
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            pass  # the program has not read what was sent


def first_of(one: Operated, number: int) -> dict[str, object] | None:
    found = one.generation(number)["first_programs"]
    assert found is None or isinstance(found, dict)
    return found


def test_with_settle_the_reload_fails_and_says_that_both_run_the_same_file(
    operated: Operating, release: Release
) -> None:
    """Though the relay gives the first one's last words when the third has failed."""
    one = serving(operated, release, "--settle", "600s")
    [relay] = running("log_relay.py", children_of(one.daemon.pid))
    release.write(BROKEN)
    trying = Running("--control", str(one.path), "reload")
    try:
        one.until("route", 2)
        os.kill(relay, signal.SIGSTOP)
        for _ in range(3):
            in_vain(one)
        os.kill(relay, signal.SIGCONT)
        assert trying.wait() == 3
    finally:
        trying.end()
    assert trying.err.text().endswith(
        "not reloaded: generation 2 failed: its first 3 programs failed early: the last exited "
        f"with status 7; generation 1 runs the same changed file: {release.path}; "
        "generation 1 is still serving\n  | oh dear"
    )
    crashes = [line.partition("pid")[2] for line in ctl(one, "crashes") if "program" in line]
    assert len(crashes) == 3
    assert all("program exited with status 7 while serving" in each for each in crashes)

    release.write(GOOD)
    assert ask(one.address, "hello") == "hello"
    one.daemon.stop()


def ctl(one: Operated, *words: str) -> list[str]:
    asked = Running("--control", str(one.path), *words)
    try:
        assert asked.wait() == 0
    finally:
        asked.end()
    return asked.out.text().splitlines()


@pytest.mark.costly
def test_without_settle_status_says_so_until_a_program_works(
    operated: Operating, release: Release
) -> None:
    one = serving(operated, release)
    release.write(BROKEN)
    assert ctl(one, "reload") == [
        "reloaded: generation 2 is serving in place of generation 1; "
        "generation 2 has run no program yet"
    ]
    in_vain(one)
    eventually(lambda: first_of(one, 2) is not None, "a program that failed early")
    eventually(lambda: "oh dear" in str(first_of(one, 2)), "its last words")
    assert first_of(one, 2) == {
        "failed": 1,
        "reason": "its first program failed early: exited with status 7",
        "last_words": "oh dear",
    }
    assert "generation 2: its first program failed early: exited with status 7: oh dear" in ctl(
        one, "status"
    )

    release.write(GOOD)
    assert ask(one.address, "hello") == "hello"
    eventually(lambda: first_of(one, 2) is None, "a program that works")
    release.write(BROKEN)
    in_vain(one)
    one.until_generation(2, errors=2)
    assert first_of(one, 2) is None, "only the first programs are looked at"
    assert json.loads("".join(ctl(one, "status", "--json")))["crashes"] == 1
    one.daemon.stop()


def test_a_program_that_fails_for_one_client_ends_no_generation(
    operated: Operating, release: Release
) -> None:
    """Two fail, the next one works: no three in a row from the start."""
    one = serving(operated, release, "--settle", "600s", "--workers", "1")
    release.write('#!/bin/sh\nread line; [ "$line" = hello ] || exit 1; echo $line\n')
    mark = one.daemon.signal(signal.SIGHUP)
    one.until("route", 2)
    for told in ("bad", "bad", "hello", "bad", "bad", "bad"):
        with socket.create_connection(one.address, DEADLINE_S) as client:
            client.sendall(told.encode() + b"\n")
            assert client.recv(100) == (b"hello\n" if told == "hello" else b"")
    one.until_generation(2, errors=5)
    assert one.status()["phase"] == "settling"
    assert not [line for line in one.daemon.log.seen[mark:] if "reload-failed" in line]
    one.daemon.stop()


@pytest.mark.costly
def test_failures_are_counted_on_by_the_next_program_of_ours(
    operated: Operating, release: Release
) -> None:
    one = serving(operated, release, "--settle", "600s", "--guard")
    release.write(BROKEN)
    mark = one.daemon.signal(signal.SIGHUP)
    one.until("route", 2)
    for count in (1, 2):
        in_vain(one)
        eventually(lambda: (first_of(one, 2) or {}).get("failed") == count, "a failure")  # noqa: B023
        revived(one.daemon, kill_protector(one.daemon))
    in_vain(one)
    one.daemon.log.wait_for("event=reload-failed generation=2 .*first 3 programs", after=mark)
    assert one.status()["route"] == 1
    one.daemon.stop()


@pytest.mark.costly
def test_a_kill_before_the_last_words_were_read_hides_no_failure(
    operated: Operating, release: Release
) -> None:
    one = serving(operated, release, "--settle", "600s", "--guard")
    [relay] = running("log_relay.py", children_of(protector_pid(one.daemon)))
    release.write("#!/bin/sh\nexit 7\n")  # silent: output makes the protector continue the relay
    begun = one.daemon.signal(signal.SIGHUP)
    one.until("route", 2)
    os.kill(relay, signal.SIGSTOP)  # it is asked for the last words
    for _ in range(3):
        in_vain(one)

    def failed() -> bool:
        """Slow as a machine may be: it is waited for its words for 2 s."""
        found = [each for each in one.status()["generations"] if each["number"] == 2]
        return not found or (found[0]["first_programs"] or {}).get("failed") == 3

    eventually(failed, "the third failure")
    mark = kill_protector(one.daemon)
    os.kill(relay, signal.SIGCONT)
    revived(one.daemon, mark)
    one.daemon.log.wait_for("event=reload-failed generation=2 .*first 3 programs", after=begun)
    assert one.status()["route"] == 1
    one.daemon.stop()


def test_status_names_a_program_that_cannot_be_started(
    operated: Operating, release: Release, tmp_path: Path
) -> None:
    one = serving(operated, release, "--workers", "1")
    release.path.rename(tmp_path / "aside")
    with Client(one.address) as client:
        client.say("hello")
        one.until_generation(1, active=1)
        why = f"a connection waits: cannot start {release.path}: No such file or directory"
        eventually(lambda: why in one.generation(1)["workers"][0]["status"], "the reason")
        (tmp_path / "aside").rename(release.path)

        assert client.hear() == "hello"
    eventually(lambda: "waits" not in one.generation(1)["workers"][0]["status"], "the news")
    one.daemon.stop()
