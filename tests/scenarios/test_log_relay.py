"""Where the log is ours: whose words a failure reports, and what rotation, kills and stops cost."""

from __future__ import annotations

import os
import pwd
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

from tests import needs
from tests.boundary.ending import traced
from tests.procfs import descriptors, state_of, wake_ups
from tests.running import Client, eventually, wait_gone
from tests.scenarios.output import relay_of, relays_of
from tests.scenarios.starting import Start
from tests.scenarios.tools import Release, hold, worker
from tests.scenarios.users import A, Command

#: Prints what it is told to, one line for each line.
TALKS = worker("talks")
FAILS = "#!/bin/sh\necho 'the reason of '$$ >&2\nexit 7\n"


@contextmanager
def talking(start: Start, *options: str, workers: int = 1) -> Iterator[Release]:
    release = Release(start.folder / "daemon.sh")
    release.becomes(*TALKS)
    start.up(*options, "--workers", str(workers), "unix:s", "--", release.path)
    yield release
    start.stop()


def failures(start: Start) -> list[str]:
    return re.findall(r"event=reload-failed .*", start.log)


def fail(start: Start, release: Release) -> str:
    """Deploy a broken release; return how that was reported."""
    release.write(FAILS)
    before = len(failures(start))
    start.send(signal.SIGHUP)
    eventually(lambda: len(failures(start)) > before, "the failure")
    return failures(start)[-1]


def spawned(start: Start, generation: int) -> list[int]:
    found = re.findall(rf"event=spawned generation={generation} .*\bpid=(\d+)", start.log)
    return [int(pid) for pid in found]


def wordless(start: Start) -> int:
    """How many lines of workers are in the log."""
    return sum("event=" not in line for line in start.log.splitlines())


@pytest.mark.costly
def test_last_words_are_the_failed_worker_s_own_however_busy_the_log_is(start: Start) -> None:
    with talking(start) as release, Client(f"{start.folder}/s") as busy:
        stop = False

        def chatter() -> None:
            while not stop:
                busy.say("\n".join(f"another worker's line {n}" for n in range(50)))
                for _ in range(50):
                    busy.hear()

        thread = Thread(target=chatter)
        thread.start()
        try:
            for generation in range(2, 7):
                told = fail(start, release)
                pids = spawned(start, generation)
                assert any(f'last_words="the reason of {pid}"' in told for pid in pids), told
        finally:
            stop = True
            thread.join()


@pytest.mark.costly
def test_each_worker_s_last_words_are_asked_for_though_many_fail_at_once(start: Start) -> None:
    with talking(start, workers=8) as release:
        told = fail(start, release)
        assert re.search(r'last_words="the reason of \d+"', told)


def test_a_rotation_takes_running_workers_lines_along(start: Start) -> None:
    with talking(start), Client(f"{start.folder}/s", "one") as client:
        start.wait_for("(?m)^one$")
        rotated = start.folder / "log.1.sh"
        start.log_file.rename(rotated)
        start.send(signal.SIGUSR1)
        start.wait_for("event=reopened")
        client.say("two")
        start.wait_for("(?m)^two$")
        assert "two" not in rotated.read_text()


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_file_has_each_line_as_it_was_written(start: Start, form: str) -> None:
    lines = ["plain", '{"level": "info", "message": "x"}', "<4>with a priority", "a" * 20_000]
    with talking(start, "--log-format", form), Client(f"{start.folder}/s") as client:
        for line in lines:
            assert client.ask(line) == line
        start.wait_for("(?m)^a{20000}$")
        found = [line for line in start.log.splitlines() if "event" not in line]
        assert found == lines


def test_a_name_that_is_not_utf_8_costs_no_line(start: Start) -> None:
    """A name is also what syslog gets, and the default name is the command's."""
    name = os.fsdecode(b"d\xe4mon")
    with talking(start, "--name", name), Client(f"{start.folder}/s", "one") as client:
        start.wait_for("(?m)^one$")
        assert client.ask("two")
        start.wait_for("(?m)^two$")
        assert "event=relay-ended" not in start.log


def test_a_killed_protector_costs_no_worker_its_output(start: Start) -> None:
    """No process gets SIGPIPE: the relay reads on, until the last writer has gone."""
    release = Release(start.folder / "daemon.sh")
    release.becomes(*TALKS)
    start.up("unix:s", "--", release.path)
    with Client(f"{start.folder}/s", "one") as client:
        start.wait_for("(?m)^one$")
        (pid,), relay, protector = spawned(start, 1), relay_of(start), start.pid
        os.kill(protector, signal.SIGKILL)
        assert wait_gone([protector]) == []
        assert client.ask("two")  # hears the answer to what it said before, too
        start.wait_for("(?m)^two$")
        assert state_of(pid) in "SR"
    assert wait_gone([relay, pid]) == []


def test_a_relay_that_is_stopped_is_continued_and_holds_no_worker_up(start: Start) -> None:
    with talking(start), Client(f"{start.folder}/s", "one") as client:
        start.wait_for("(?m)^one$")
        relay = relay_of(start)
        hold(relay)
        for number in range(200):  # far more than a pipe holds
            assert client.hear()
            client.say(f"{number} " + "x" * 1000)
        start.wait_for("(?m)^199 ")
        start.wait_for("event=relay-stopped")
        assert relays_of(start) == [relay]  # and nothing is lost
        assert wordless(start) == 201


def lowest_free(pid: int) -> int:
    """Return the number that the next descriptor of a process gets."""
    opened = {int(each) for each in os.listdir(f"/proc/{pid}/fd")}
    return next(each for each in range(len(opened) + 1) if each not in opened)


@pytest.mark.costly
def test_a_relay_whose_limit_of_descriptors_was_lowered_reads_from_new_workers(
    start: Start,
) -> None:
    with talking(start), Client(f"{start.folder}/s", "first"):
        start.wait_for("(?m)^first$")  # the relay has started, and opens no more modules
        relay = relay_of(start)
        _, hard = resource.prlimit(relay, resource.RLIMIT_NOFILE)
        resource.prlimit(relay, resource.RLIMIT_NOFILE, (lowest_free(relay), hard))
        start.reload()
        with Client(f"{start.folder}/s") as client:
            for number in range(200):  # far more than a pipe holds
                assert client.ask(f"{number} " + "x" * 1000)
        start.wait_for("(?m)^199 ")
        assert start.log.count("event=relay-short") == 1
        assert relays_of(start) == [relay]


@needs.ANOTHER_USER
@pytest.mark.costly
def test_a_relay_whose_limit_we_may_not_raise_is_replaced(command: Command) -> None:
    """It passes on what is in the pipes first, so nothing is lost."""
    start = command.start
    command.up("--user", A, "unix:s", "--", *command.worker("talks"))
    with Client(f"{start.folder}/s", "one") as client:
        start.wait_for("(?m)^one$")
        relay = relay_of(start)
        full = 2 * [lowest_free(relay)]
        code = f"import resource as r; r.prlimit({relay}, r.RLIMIT_NOFILE, {full})"
        group = pwd.getpwnam(A).pw_gid
        subprocess.run([command.python, "-c", code], user=A, group=group, cwd="/", check=True)
        hold(relay)
        assert client.ask("two")
        start.reload()
        with suppress(ProcessLookupError):  # the protector has continued and replaced it already
            os.kill(relay, signal.SIGCONT)
        with Client(f"{start.folder}/s") as newer:
            for number in range(200):  # far more than a pipe holds
                assert newer.ask(f"{number} " + "x" * 1000)
        start.wait_for("(?m)^199 ")
        assert wait_gone([relay]) == []
        assert len(relays_of(start)) == 1
        assert start.log.count("event=relay-short ") == 1
        assert "event=relay-ended" not in start.log
        assert wordless(start) == 202
    start.stop()


@pytest.mark.costly
def test_a_relay_that_cannot_be_continued_is_replaced(start: Start) -> None:
    """As one under a debugger."""
    with talking(start), Client(f"{start.folder}/s", "one") as client:
        start.wait_for("(?m)^one$")
        relay = relay_of(start)
        with traced(relay):
            hold_traced(relay)
            client.say("two")
            eventually(lambda: state_of(relay) in "ZX", "its end")
        start.wait_for("event=relay-ended")
        start.wait_for("(?m)^two$")
        assert relay_of(start) not in (0, relay)


def hold_traced(pid: int) -> None:
    """Stop it as its debugger's: SIGCONT does not continue it."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) in "Tt", f"process {pid} stopped")


@pytest.mark.parametrize("how", ["upgrade", "kill"])
@pytest.mark.costly
def test_a_failure_is_reported_though_the_protector_is_replaced_meanwhile(
    start: Start, how: str
) -> None:
    """While last words are waited for the worker is not reaped: so its end is found again."""
    with talking(start, "--guard") as release:
        protector = int(re.findall(r"event=start pid=(\d+)", start.log)[-1])
        hold(relay_of(start))
        release.write(FAILS)
        start.send(signal.SIGHUP)
        start.wait_for("event=spawned generation=2")
        (failed,) = spawned(start, 2)
        eventually(lambda: state_of(failed) in "ZX", "the end of the worker")
        start.send(signal.SIGUSR1)
        start.wait_for("event=reopened")  # it has stored what it spawned
        os.kill(protector, signal.SIGKILL if how == "kill" else signal.SIGUSR2)
        start.wait_for("event=resumed")
        start.wait_for("event=reload-failed")
        assert "exited with status 7 before it was ready" in failures(start)[-1]
        start.wait_for("the reason of")
        release.becomes(*TALKS)
        start.reload()
        eventually(lambda: len(relays_of(start)) == 1, "the end of one that was replaced")


def test_without_the_relay_workers_write_to_the_file_and_the_reason_says_where(
    start: Start,
) -> None:
    with talking(start, "--no-log-relay") as release:
        assert relays_of(start) == []
        with Client(f"{start.folder}/s", "one"):
            start.wait_for("(?m)^one$")
        told = fail(start, release)
        assert "last_words" not in told  # others write there as well
        assert f"see {start.log_file}" in told
        (pid,) = spawned(start, 1)
        assert descriptors(pid)[1] == str(start.log_file)


@pytest.mark.costly
def test_an_upgrade_of_one_that_had_no_relay_gives_new_workers_one(start: Start) -> None:
    """The settings of a program that did not know of it have its default."""
    with talking(start), Client(f"{start.folder}/s", "one"):
        start.wait_for("(?m)^one$")
        relay = relay_of(start)
        start.send(signal.SIGUSR2)
        start.wait_for("event=resumed")
        start.reload()
        (pid,) = spawned(start, 2)
        assert descriptors(pid)[1].startswith("pipe:")
        assert relays_of(start) == [relay]


def test_a_worker_can_reopen_dev_stdout(start: Start) -> None:
    """As nginx and php-fpm do, also as another user."""
    release = Release(start.folder / "daemon.sh")
    words = " ".join(TALKS)
    release.write(f"#!/bin/sh\necho opened >/dev/stdout\nexec {words}\n")
    start.up("unix:s", "--", release.path)
    start.wait_for("(?m)^opened$")
    start.stop()


@pytest.mark.costly
def test_at_rest_the_relay_wakes_no_process(start: Start) -> None:
    with talking(start), Client(f"{start.folder}/s", "one") as client:
        start.wait_for("(?m)^one$")
        pids = (start.pid, relay_of(start))

        def asleep() -> bool:
            before = [wake_ups(pid) for pid in pids]
            end = time.monotonic() + 1.0
            eventually(lambda: time.monotonic() > end, "a second")
            return [wake_ups(pid) for pid in pids] == before

        eventually(asleep, "rest")
        client.say("two")
        start.wait_for("(?m)^two$")
        eventually(asleep, "rest again")
