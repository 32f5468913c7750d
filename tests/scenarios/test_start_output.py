"""Where output goes: syslog through the relay, the log file, the terminal of the foreground."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import sys
import termios

import pytest

from tests import needs
from tests.procfs import children_of, cpu_s, descriptors, name_of, status_of, wake_ups
from tests.running import Client, Lines, ask, eventually, wait_gone
from tests.scenarios.output import Syslog, relay_of, relays_of
from tests.scenarios.starting import MINIMAL, Start, start_of
from tests.scenarios.tools import worker

# -- paths with line breaks --------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("-f",), ("--check",)], ids=["detached", "-f", "check"])
@pytest.mark.costly
def test_a_path_with_a_line_break_is_shown_in_one_line(start: Start, mode: tuple[str, ...]) -> None:
    folder = start.folder / "a\nb"
    folder.mkdir()
    shutil.copy("/bin/false", folder / "false")
    files = ("--control", folder / "none" / "control", "--log-file", folder / "log")

    ended = start(*mode, *files, f"unix:{folder}/s?mode=0600", "--", folder / "false")

    assert ended.status == (0 if mode == ("--check",) else 3), ended
    said = [*ended.lines, *ended.out.splitlines()]
    assert all(line.startswith("SocketProtector: ") for line in said), ended
    shown = str(folder).replace("\n", "\\n")
    assert f"{shown}/false" in said[-1]
    if mode != ("--check",):
        assert f"cannot listen on {shown}/none/control: " in said[0]
        assert said[-1].endswith(f"see {shown}/log")


def test_a_configuration_file_with_a_line_break_in_its_name_is_shown_in_one_line(
    start: Start,
) -> None:
    file = start.folder / "a\nb.toml"
    file.write_text("workers = \n")

    [line] = start("--config", file, "127.0.0.1:0", "--", *MINIMAL).lines

    assert f"{start.folder}/a\\nb.toml line 1: not TOML" in line


# -- the relay -----------------------------------------------------------------

#: Prints what it is told to, one line for each line.
TALKS = worker("talks")


def test_output_of_a_detached_protector_goes_to_syslog(start: Start, syslog: Syslog) -> None:
    ended = start("--name", "shop", "unix:s?mode=0600", "--", *TALKS, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    assert ended.status == 0, ended

    # daemon.info is facility 3, severity 6; daemon.warning is 28.
    assert syslog.wait_for("event=ready").startswith("<30>")
    assert re.search(r" shop(\[\d+\])?: event=ready", syslog.wait_for("event=ready"))
    with Client(f"{start.folder}/s", "a line from the worker"):
        assert syslog.wait_for("a line from the worker").startswith("<30>")
    with Client(f"{start.folder}/s", "<4>a warning"):
        assert syslog.wait_for("a warning$").startswith("<28>")
    with Client(f"{start.folder}/s", "x" * 20000):
        eventually(lambda: sum(line.count("x" * 1000) for line in list(syslog.seen)) >= 19, "all")
    start.stop()
    assert syslog.wait_for("event=stopped")
    assert [left for left in start.left() if "process" in left] == []


@pytest.mark.costly
def test_a_relay_that_is_killed_breaks_no_workers_output_and_comes_back(
    start: Start, syslog: Syslog
) -> None:
    ended = start("unix:s?mode=0600", "--", *TALKS, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    relay = relay_of(start)
    protector = start.pid

    os.kill(relay, signal.SIGKILL)
    assert not wait_gone([relay])
    # What is written while there is none waits in the pipe.
    with Client(f"{start.folder}/s", "in between"):
        syslog.wait_for("in between")

    syslog.wait_for("event=relay-ended")
    assert relay_of(start) not in (0, relay)
    assert start.pid == protector
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()


def test_lines_of_the_guard_have_the_priority_of_the_protectors(
    start: Start, syslog: Syslog
) -> None:
    ended = start("--guard", "unix:s?mode=0600", "--", *TALKS, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    [protector] = [pid for pid in children_of(start.pid) if name_of(pid) == "SocketProtector"]

    start.send(signal.SIGUSR1)
    syslog.wait_for("event=reopened")  # so the guard knows that the start has succeeded

    os.kill(protector, signal.SIGKILL)

    # daemon.warning is 28.  The time is syslog's alone.
    line = syslog.wait_for("event=protector-died")
    assert re.match(r"<28>[^<]*: event=protector-died ", line), line
    start.stop()


@pytest.mark.costly
def test_the_relay_lives_as_long_as_its_last_writer(start: Start, syslog: Syslog) -> None:
    ended = start("unix:s?mode=0600", "--", *TALKS, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    relay = relay_of(start)
    client = Client(f"{start.folder}/s")
    client.say("one")
    syslog.wait_for("one$")

    protector = start.pid
    os.kill(protector, signal.SIGKILL)
    assert not wait_gone([protector])

    # The worker goes on serving the clients it has, and is heard.
    client.say("two")
    syslog.wait_for("two$")
    assert relay_of(start) == relay
    client.close()
    assert not wait_gone([relay])


@pytest.mark.costly
def test_stop_signals_do_not_end_the_relay(start: Start, syslog: Syslog) -> None:
    ended = start("unix:s?mode=0600", "--", *TALKS, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    relay, signals = relay_of(start), (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    wanted = sum(1 << number - 1 for number in signals)

    def is_up() -> bool:
        return int(status_of(relay)["SigIgn"], 16) & wanted == wanted

    eventually(is_up, "the relay, which ignores them from then on")
    for number in signals:
        os.kill(relay, number)
    with Client(f"{start.folder}/s", "still here"):
        syslog.wait_for("still here")

    assert relay_of(start) == relay
    start.stop()


def up_with_relay(start: Start, syslog: Syslog, *options: str) -> int:
    """Start a protector that logs through a relay; return the relay's pid."""
    ended = start(*options, "unix:s?mode=0600", "--", *TALKS, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    assert ended.status == 0, ended
    return relay_of(start)


def prints(start: Start, syslog: Syslog, line: str) -> None:
    """Have the worker print a line, and wait until syslog has it."""
    with Client(f"{start.folder}/s", line):
        syslog.wait_for(f"{line}$")


@pytest.mark.costly
def test_an_upgrade_keeps_the_relay(start: Start, syslog: Syslog) -> None:
    relay = up_with_relay(start, syslog)

    for number in range(2):
        start.send(signal.SIGUSR2)
        eventually(lambda n=number: syslog.count("event=resumed") == n + 1, "an upgrade")  # type: ignore[misc]
        prints(start, syslog, f"after upgrade {number}")

    assert relays_of(start) == [relay]
    start.stop()
    syslog.wait_for("event=stopped")
    assert not wait_gone([relay])


def kill_guarded(start: Start, syslog: Syslog) -> None:
    """SIGKILL the protector of a guard, and wait for the one that goes on."""
    syslog.wait_for("event=start pid=")
    known = syslog.count("event=resumed")
    pids = [re.findall(r"event=(?:start|resumed) pid=(\d+)", line) for line in list(syslog.seen)]
    os.kill(int([pid for found in pids for pid in found][-1]), signal.SIGKILL)
    eventually(lambda: syslog.count("event=resumed") > known, "another protector")


def test_under_a_guard_a_killed_protector_finds_the_relay_again(
    start: Start, syslog: Syslog
) -> None:
    relay = up_with_relay(start, syslog, "--guard")

    kill_guarded(start, syslog)
    syslog.wait_for("event=protector-died")  # said by the guard, on the same way
    prints(start, syslog, "after the kill")
    assert relays_of(start) == [relay]

    # It is the guard's child now: its end is seen all the same.
    os.kill(relay, signal.SIGKILL)
    prints(start, syslog, "after both")
    syslog.wait_for("event=relay-ended")
    assert len(relays_of(start)) == 1
    start.stop()
    assert [left for left in start.left() if "process" in left] == []


@pytest.mark.costly
def test_a_protector_killed_after_a_new_relay_has_one_still(start: Start, syslog: Syslog) -> None:
    """Two on one pipe would tear lines apart."""
    relay = up_with_relay(start, syslog, "--guard")
    os.kill(relay, signal.SIGKILL)
    prints(start, syslog, "a new relay")
    (new,) = relays_of(start)
    assert new != relay

    kill_guarded(start, syslog)

    prints(start, syslog, "and a new protector")
    eventually(lambda: syslog.count("event=relay-ended") == 1, "no end of another relay")
    assert relays_of(start) == [new]
    start.stop()


@pytest.mark.costly
def test_a_relay_that_dies_where_no_descriptor_is_left_comes_back_with_one(
    start: Start, syslog: Syslog
) -> None:
    relay = up_with_relay(start, syslog)
    held = Client(f"{start.folder}/s")
    assert held.ask("before") == "before"
    soft, hard = resource.prlimit(start.pid, resource.RLIMIT_NOFILE)
    used = max(descriptors(start.pid)) + 1
    resource.prlimit(start.pid, resource.RLIMIT_NOFILE, (3, hard))

    os.kill(relay, signal.SIGKILL)
    assert not wait_gone([relay])
    woken, cpu = wake_ups(start.pid), cpu_s(start.pid)
    eventually(lambda: wake_ups(start.pid) >= woken + 3, "its next tries")
    assert cpu_s(start.pid) - cpu < 0.5
    assert relays_of(start) == []
    assert held.ask("meanwhile") == "meanwhile"
    held.close()
    resource.prlimit(start.pid, resource.RLIMIT_NOFILE, (soft, hard))

    syslog.wait_for("event=relay-ended")
    syslog.wait_for("meanwhile$")
    assert len(relays_of(start)) == 1
    assert max(descriptors(start.pid)) < used + 2
    start.stop()


@pytest.mark.costly
def test_without_any_syslog_it_runs_all_the_same_and_its_lines_come_once_there_is_one(
    start: Start, syslog: Syslog
) -> None:
    """As in a container, or at boot: said on the terminal, as the log cannot be read there."""
    ended = start("unix:s?mode=0600", "--", *TALKS, before=syslog.before_it_comes)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    assert (ended.status, ended.warned, ended.err) == (0, True, ""), ended
    assert ask(f"{start.folder}/s") == "hello"

    with Client(f"{start.folder}/s") as client:
        syslog.come(start.pid)
        client.say("from the worker")
        syslog.wait_for("from the worker$")
    start.send(signal.SIGHUP)
    syslog.wait_for("event=reloaded")
    start.stop()
    syslog.wait_for("event=stopped")
    assert start.left() == []


@pytest.mark.parametrize(
    ("options", "warned"),
    [((), True), (("--no-log-relay",), True), (("--log-file", "log"), False), (("-f",), False)],
    ids=["detached", "no relay", "log file", "foreground"],
)
@pytest.mark.costly
def test_a_check_says_that_there_is_no_syslog_where_the_log_would_go_there(
    start: Start, syslog: Syslog, options: tuple[str, ...], warned: bool
) -> None:
    words = ("--check", *options, "unix:s?mode=0600", "--", *MINIMAL)

    without = start(*words, before=syslog.before_it_comes)
    if without.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    beside = start(*words, before=syslog.before)

    assert (without.status, without.warned, without.err) == (0, warned, ""), without
    assert (beside.status, beside.warned, beside.err) == (0, False, ""), beside


def test_a_socket_file_at_dev_log_without_a_listener_is_no_syslog(
    start: Start, syslog: Syslog
) -> None:
    """A syslog that has ended, or a mount of it into a container that outlives it."""
    syslog.end()

    ended = start("--check", "unix:s?mode=0600", "--", *MINIMAL, before=syslog.before)
    if ended.status == 77:
        needs.skip("mounts" if needs.IS_ROOT else "root")
    assert (ended.status, ended.warned) == (0, True), ended


# -- the log file --------------------------------------------------------------


def test_the_log_file_is_appended_to_and_shared(start: Start) -> None:
    start.log_file.write_text("from before\n")
    start.up("unix:s?mode=0600", "--", *TALKS)
    with Client(f"{start.folder}/s", "from the worker"):
        start.wait_for("from the worker")
    start.stop()

    lines = start.log.splitlines()
    assert lines[0] == "from before"
    assert "event=stopped" in lines[-1]
    assert "from the worker" in lines
    # Every line is whole, and the protector's begin with the time.
    own = [line for line in lines if "event=" in line]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \w+ event=", line) for line in own)


@pytest.mark.costly
def test_a_relative_log_file_is_the_callers(start: Start) -> None:
    ended = start("--log-file", "log", "--chdir", "/", "unix:s?mode=0600", "--", *MINIMAL)

    assert ended.status == 0
    assert "event=ready" in start.log
    start.stop()


def test_every_line_of_a_json_log_is_an_object(start: Start) -> None:
    start.up("--log-format", "json", "unix:s?mode=0600", "--", *MINIMAL)
    start.send(signal.SIGHUP)
    start.wait_for('"event": "reloaded", "generation": 2')
    start.stop()

    events = [json.loads(line) for line in start.log.splitlines()]
    assert [each["event"] for each in events][-1] == "stopped"
    assert all({"time", "level", "event"} <= each.keys() for each in events)
    assert {"event": "ready", "generation": 1}.items() <= next(
        each.items() for each in events if each["event"] == "ready"
    )


# -- the foreground ------------------------------------------------------------


def test_the_foreground_is_the_process_that_the_caller_started(start: Start) -> None:
    with start_of(start, "-f", "unix:s?mode=0600", "--", *TALKS) as process:
        assert process.stderr
        assert process.stdout
        log = Lines(os.dup(process.stderr.fileno()))
        out = Lines(os.dup(process.stdout.fileno()))
        log.wait_for(f"event=start pid={process.pid} ")
        log.wait_for("event=ready")
        assert start.pid == process.pid
        with Client(f"{start.folder}/s", "from the worker"):
            out.wait_for("^from the worker$")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        log.join()
        out.join()
    assert start.left() == []


def test_lines_in_a_regular_file_do_not_overwrite_each_other(start: Start) -> None:
    """`2>&1 >file` without append: all have one offset, so it must be one description."""
    with (
        open(start.folder / "all.sh", "wb") as file,
        start_of(
            start, "-f", "unix:s?mode=0600", "--", *TALKS, stdout=file, stderr=file
        ) as process,
    ):
        path = start.folder / "all.sh"
        eventually(lambda: "event=ready" in path.read_text(), "ready")
        with Client(f"{start.folder}/s") as client:
            for number in range(50):
                client.say(f"line {number}")
                process.send_signal(signal.SIGTTIN if number % 2 else signal.SIGTTOU)
            eventually(lambda: "line 49\n" in path.read_text(), "the last line")
        process.send_signal(signal.SIGUSR1)  # this file has no name that could be opened again
        eventually(lambda: "event=reopen-failed" in path.read_text(), "refused")
        process.send_signal(signal.SIGINT)
        process.wait()

    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("line")] == [f"line {n}" for n in range(50)]
    stamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \w+ event=\w|line \d+$")
    assert [line for line in lines if not stamp.match(line)] == []
    assert "event=stopped" in lines[-1]
    assert not [line for line in lines if "event=reopened" in line]


def test_a_reader_of_the_log_that_does_not_read_never_holds_anything_up(start: Start) -> None:
    receive, send = os.pipe()
    fcntl.fcntl(send, fcntl.F_SETPIPE_SZ, 4096)
    with start_of(
        start, "-f", "unix:s?mode=0600", "--", *MINIMAL, stderr=send, stdout=send
    ) as process:
        os.close(send)

        def waiting() -> int:
            return int.from_bytes(fcntl.ioctl(receive, termios.FIONREAD, bytes(4)), sys.byteorder)

        def full() -> bool:
            process.send_signal(signal.SIGUSR1)  # each is two lines
            return waiting() > 4096 - 200

        eventually(lambda: waiting() > 0, "the first line")
        eventually(full, "a full pipe")
        for _ in range(20):
            process.send_signal(signal.SIGUSR1)
            assert ask(f"{start.folder}/s") == "hello"
        os.close(receive)
        for _ in range(20):
            process.send_signal(signal.SIGUSR1)
            assert ask(f"{start.folder}/s") == "hello"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    assert start.left() == []
