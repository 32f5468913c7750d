"""The command line: what it says, what it refuses, and what each option does to a worker."""

from __future__ import annotations

import grp
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.procfs import descriptors, name_of
from tests.running import COMMAND, Lines, Protector, ask, eventually, wait_gone
from tests.scenarios.starting import MINIMAL, TELLS, Start, told

SCRIPT = (str(Path(sys.executable).with_name("SocketProtector")),)

# -- words ---------------------------------------------------------------------


@pytest.mark.parametrize("command", [COMMAND, SCRIPT], ids=["module", "script"])
def test_the_version_is_said(start: Start, command: tuple[str, ...]) -> None:
    ended = start("--version", command=command)

    assert ended.status == 0
    assert re.fullmatch(r"SocketProtector, version \d+\.\d+\.\d+\n", ended.out)


@pytest.mark.parametrize("words", [["-pid-file", "{}"], ["-pid-file={}"], ["--pid-file={}"]])
def test_the_originals_options_with_one_dash_are_understood(start: Start, words: list[str]) -> None:
    given = [word.format(start.folder / "other") for word in words]

    with start.popen(*given, "-foreground", "-verbose", "127.0.0.1:0", "--", *MINIMAL) as process:
        assert process.stderr
        log = Lines(os.dup(process.stderr.fileno()))
        log.wait_for(r" debug event=decided .*Launched")
        log.wait_for(r"event=ready\b")
        assert (start.folder / "other").read_text() == f"{process.pid}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        log.join()


# -- check ---------------------------------------------------------------------


def test_check_says_that_it_would_start_and_starts_nothing(start: Start) -> None:
    words = ["127.0.0.1:0", f"unix:{start.folder}/s?mode=0600", "--", *MINIMAL]

    ended = start("--check", "--log-file", start.log_file, *words)

    assert ended.status == 0, ended
    assert "would start" in ended.out
    assert start.left() == []
    assert not start.log_file.exists()


WITH_200_DESCRIPTORS = ("/bin/sh", "-c", 'ulimit -n 200 && exec "$@"', "-")


@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "start"])
def test_more_workers_than_there_are_descriptors_for_are_refused(
    start: Start, check: list[str]
) -> None:
    words = ["-f", "127.0.0.1:0", "--", *MINIMAL]

    ended = start(*check, "--workers", "600", *words, before=WITH_200_DESCRIPTORS)

    assert ended.status == 2
    assert "600 workers need 4 descriptors each, and the hard limit of 200 has room" in ended.err
    assert ended.err.count("\n") == 1
    assert start.left() == []


def test_check_says_where_a_reload_would_find_no_room(start: Start) -> None:
    words = ["-f", "--workers", "30", "127.0.0.1:0", "--", *MINIMAL]

    ended = start("--check", *words, before=WITH_200_DESCRIPTORS)

    assert ended.status == 0
    assert "30 workers: a reload starts as many new ones first" in ended.err


def test_what_the_locale_cannot_encode_is_refused_with_its_line(start: Start) -> None:
    file = start.folder / "web.toml"
    lines = (
        "# caf\u00e9",
        "listen = ['unix:\u00e9', '127.0.0.1:0']",
        "command = ['true', '\u00e9']",
    )
    file.write_text("\n".join((*lines, "user = '\u00e9'", "[env]", "A = '\u00e9'")), "utf-8")
    ascii_only = ("env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")

    ended = start("--check", "--config", file, before=ascii_only)

    assert ended.status == 2, ended
    why = "has a character that this locale cannot encode; set LC_ALL=C.UTF-8"
    keys = {2: "listen", 3: "command", 4: "user", 6: "env.A"}
    said = [f"{file} line {number}: {key}: {why}" for number, key in keys.items()]
    assert ended.err.removeprefix("SocketProtector: ").splitlines() == said


def test_check_names_a_control_socket_that_a_start_could_not_bind(start: Start) -> None:
    """A start would go on without it."""
    path = start.folder / "missing" / "control"

    ended = start("--check", "--control", path, "127.0.0.1:0", "--", *MINIMAL)

    assert ended.status == 0, ended
    assert f"cannot write the control socket {path}: No such file" in ended.err


@pytest.mark.parametrize("guard", [["--guard"], []], ids=["guard", "plain"])
@pytest.mark.costly
def test_check_is_about_a_start_after_the_end_of_the_one_that_runs(
    start: Start, guard: list[str]
) -> None:
    start.up(*guard, "127.0.0.1:0", f"unix:{start.folder}/s?mode=0600", "--", *MINIMAL)
    host, port = start.address
    tcp, unix = f"{host}:{port}", f"unix:{start.folder}/s?mode=0600"

    for listens in ([tcp, unix], [f"{port}"]):
        ended = start("--check", *listens, "--", *MINIMAL)
        assert ended.status == 0, ended
        assert f"process {start.pid} runs with this pid file" in ended.err
        assert "would start" in ended.out
        assert "diff`" not in ended.err  # it compares a file, and there is none
    file = start.folder / "check.toml"
    file.write_text(f"listen = '{port}'\ncommand = {list(MINIMAL)!r}\n")
    assert "diff`" in start("--check", "--config", str(file)).err
    file.unlink()
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        taken = f"127.0.0.1:{foreign.getsockname()[1]}"
        for wrong, status in ((taken, 111), (f"{tcp}?nonsense=1", 2), ("192.0.2.1:1", 111)):
            ended = start("--check", unix, wrong, "--", *MINIMAL)
            assert (ended.status, "would start" in ended.out) == (status, False), ended
    # Without the pid file nothing says whose the address is.
    ended = start("--check", "--pid-file", "other", tcp, "--", *MINIMAL)
    assert ended.status == 111
    assert ask(f"{start.folder}/s") == "hello"
    start.stop()


@needs.ROOT
@pytest.mark.costly
def test_a_units_group_for_status_is_used_if_no_other_is_set_and_it_is_there(
    start: Start,
) -> None:
    one, other = grp.getgrall()[1:3]
    for said, options, gid in (
        (one.gr_name, (), one.gr_gid),
        (one.gr_name, ("--status-group", other.gr_name), other.gr_gid),
        ("no-such-group", (), None),
    ):
        start.environment["SOCKETPROTECTOR_STATUS_GROUP"] = said
        control = start.folder / "control"
        start.up("--control", control, *options, "unix:s?mode=0600", "--", *MINIMAL)
        found = control.stat()
        assert (found.st_mode & 0o777, found.st_gid) == (
            (0o600, os.getegid()) if gid is None else (0o660, gid)
        )
        os.kill(start.pid, signal.SIGHUP)
        eventually(lambda: "event=reloaded" in start.log, "a reload")
        assert "status-group" not in start.log
        start.stop()
        start.log_file.unlink()


# -- what options do to workers ------------------------------------------------


def test_a_worker_gets_what_the_options_say(start: Start) -> None:
    room = start.folder / "room.sh"
    room.mkdir()
    (start.folder / "settings.sh").write_text("FROM_FILE='in the file'\nBOTH=file\n")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    start.up(
        *("--chdir", "room.sh", "--umask", "027", "--env-file", "settings.sh"),
        *("--env", "BOTH=option", "--env", "WITH_EQUALS=a=b", "--env", "EMPTY="),
        *("--limit", "nofile=300", "--limit", "core=0", "--limit", "nice=3"),
        *("127.0.0.1:0", "--", *TELLS, "one", "--", "-f"),
    )
    found = told(start.address)

    assert found["directory"] == str(room)
    assert found["umask"] == 0o027
    environment = found["environment"]
    assert environment["FROM_FILE"] == "in the file"
    assert environment["BOTH"] == "option"
    assert environment["WITH_EQUALS"] == "a=b"
    assert environment["EMPTY"] == ""
    assert environment["PWD"] == str(room)
    assert found["nofile"] == [300, hard]
    assert found["core"][0] == 0
    assert found["nice"] == os.nice(0) + 3
    assert found["argv"][1:] == ["one", "--", "-f"]
    # They are the workers' alone.
    soft, hard = resource.prlimit(start.pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    assert os.getpriority(os.PRIO_PROCESS, start.pid) == os.getpriority(0, 0)
    start.stop()


def test_a_worker_without_options_gets_what_the_caller_had(start: Start) -> None:
    start.up("127.0.0.1:0", "--", *TELLS, environment={"FROM_CALLER": "yes"}, umask=0o077)
    found = told(start.address)

    assert found["directory"] == str(start.folder)
    assert found["umask"] == 0o077
    assert found["nofile"] == list(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert found["core"] == list(resource.getrlimit(resource.RLIMIT_CORE))
    assert found["nice"] == os.nice(0)
    assert found["environment"]["FROM_CALLER"] == "yes"
    assert found["environment"]["PATH"] == os.environ["PATH"]
    start.stop()


def test_a_unit_with_a_higher_limit_says_what_workers_get(start: Start) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    start.up("127.0.0.1:0", "--", *TELLS, environment={"SOCKETPROTECTOR_NOFILE": "200"})
    found = told(start.address)

    assert found["nofile"] == [200, hard]
    assert "SOCKETPROTECTOR_NOFILE" not in found["environment"]
    start.stop()


def test_the_env_file_is_read_again_at_each_reload(start: Start) -> None:
    file = start.folder / "settings.sh"
    file.write_text("# a comment\n\nexport COLOUR=red\n")
    start.up("--env-file", "settings.sh", "127.0.0.1:0", "--", *TELLS)
    assert told(start.address)["environment"]["COLOUR"] == "red"

    file.write_text('COLOUR="dark blue"\n')
    assert told(start.address)["environment"]["COLOUR"] == "red"
    start.reload()

    assert told(start.address)["environment"]["COLOUR"] == "dark blue"
    start.stop()


def test_a_command_without_a_slash_is_found_in_the_workers_path(start: Start) -> None:
    folder = start.folder / "bin.sh"
    folder.mkdir()
    (folder / "my-daemon").symlink_to("/bin/sh")

    start.up(
        "--env", f"PATH={folder}", "127.0.0.1:0", "--", "my-daemon", "-c", f"exec {' '.join(TELLS)}"
    )

    assert told(start.address)["environment"]["PATH"] == str(folder)
    assert " name=my-daemon " in start.log
    start.stop()


@pytest.mark.costly
def test_several_workers_are_started(protector: Callable[..., Protector]) -> None:
    daemon = protector("--workers", "3", "127.0.0.1:0", "--", *MINIMAL).ready()

    assert daemon.log.count("event=spawned generation=1 ") == 3
    assert len(daemon.worker_pids()) == 3
    daemon.stop()


@pytest.mark.parametrize("time", ["1ms", "0.001", "0.001s", "0.00002m", "0.0000003h", "1e-3"])
def test_a_duration_is_read_in_every_unit(start: Start, time: str) -> None:
    """A worker that lives for so long is ready; and one never says so by itself."""
    start.up("--ready", f"after:{time}", "127.0.0.1:0", "--", "/bin/sleep", "1000")

    assert "event=ready" in start.log
    start.stop(signal.SIGINT)


def test_the_log_level_is_a_threshold(start: Start) -> None:
    start.up("--log-level", "warning", "127.0.0.1:0", "--", *MINIMAL)
    start.stop()

    assert "event=" not in start.log


def test_the_name_is_shown_in_the_log_and_by_ps(start: Start) -> None:
    start.up("--name", "shop", "--env", "SECRET=hush", "127.0.0.1:0", "--", *MINIMAL, "hush")

    words = Path(f"/proc/{start.pid}/cmdline").read_text()
    assert " name=shop " in start.log
    assert "shop" in words.split("\0")
    assert "hush" not in words
    assert name_of(start.pid) == "SocketProtector"
    start.stop()


def test_the_log_is_reopened_on_usr1(start: Start) -> None:
    start.up("--no-log-relay", "127.0.0.1:0", "--", *MINIMAL)
    rotated = start.folder / "log.1"
    start.log_file.rename(rotated)

    start.send(signal.SIGUSR1)
    start.wait_for("event=reopened")
    start.reload()

    # The workers of the first generation keep the old file; those of the new one do not.
    assert "event=ready" in rotated.read_text()
    assert "event=reloaded" not in rotated.read_text()
    worker = re.findall(r"event=spawned generation=2 .*pid=(\d+)", start.log)[0]
    assert descriptors(int(worker))[2] == str(start.log_file)
    start.stop()


@pytest.mark.costly
def test_a_log_that_cannot_be_reopened_goes_on_where_it_was(start: Start) -> None:
    folder = start.folder / "logs.sh"
    folder.mkdir()
    start.log_file = folder / "log"
    start.up("127.0.0.1:0", "--", *MINIMAL)
    moved = start.folder / "moved.sh"
    folder.rename(moved)
    start.log_file = moved / "log"

    start.send(signal.SIGUSR1)

    start.wait_for("event=reopen-failed .*No such file")
    start.reload()
    start.stop()


def test_the_launching_process_says_nothing_when_all_is_well(start: Start) -> None:
    ended = start.up(f"unix:{start.folder}/s?mode=0600", "--", *MINIMAL)

    assert (ended.out, ended.err) == ("", "")
    pid = start.pid
    start.stop()
    assert not wait_gone([pid])
    eventually(lambda: start.left() == [], "nothing left")
