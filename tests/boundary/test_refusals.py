"""What the command line refuses before it starts anything: one line, a status, nothing left behind.

The command is run up to where it would launch (`typed`).  What takes a process, another user or
another process's socket, and each exit status once as a shell sees it: tests/scenarios.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from socketprotector.launch import cli, option_values, options, preflight, rollout_checks
from socketprotector.launch.preflight import check_siblings
from socketprotector.launch.resolve import ParsedOptions
from socketprotector.model import known_servers
from socketprotector.model.errors import UsageError
from socketprotector.model.settings import ListenerSettings
from tests import needs
from tests.boundary.conftest import Typed
from tests.running import Ended
from tests.together import together

needs_root = needs.ANOTHER_USER

#: The names of the types of options that take a number.
MEASURES = ("TIME", "SIZE", "N[+-J]", "integer range", "OCTAL")
LISTENER = ("--handoff", "listener")
CANARY = ("--canary", "5%")
ROLLING = ("--reload-order", "rolling", "--drain-timeout", "9s")
SETTLES = ("--settle", "5s", "--settle-check")


def refused(ended: Ended, status: int, *said: str) -> None:
    """It ended with this status and one line in which all of this is said."""
    assert ended.status == status, ended
    assert len(ended.lines) == 1, ended
    assert ended.err.startswith("SocketProtector: ")
    assert [words for words in said if not re.search(words, ended.err)] == [], ended


@pytest.fixture(params=["detached", "foreground"])
def mode(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ("-f",) if request.param == "foreground" else ()


@pytest.mark.parametrize("words", ["-h", "-?", "--help"])
def test_help_is_one_screen_of_common_options(typed: Typed, words: str) -> None:
    ended = typed(words)

    lines = ended.out.splitlines()
    shown = re.findall(
        r"^  (?:-\w, )?(--[\w-]+)[ \n]", ended.out.split("Options:")[1], re.MULTILINE
    )
    assert ended.status == 0
    assert "LISTEN... -- COMMAND [ARG...]" in lines[0]
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 79
    assert shown == [f"--{each.key}" for each in options.OPTIONS if each.common]
    assert len(shown) == 12
    assert "Signals: HUP reload; TERM stop" in ended.out
    assert "--help-all: every option" in ended.out


def test_help_all_names_every_option_in_its_group(typed: Typed) -> None:
    ended = typed("--help-all")

    assert ended.status == 0
    assert re.findall(r"^(?:([A-Z]\w+):$|  (?:-.+, )?--([\w-]+))", ended.out, re.MULTILINE) == [
        found
        for title, group in options.GROUPS.items()
        for found in ((title, ""), *(("", each.key) for each in group))
    ]
    for name in known_servers.KNOWN:
        assert f"  {known_servers.line(name)}\n" in f"{ended.out}\n"


def test_one_that_is_not_unpacked_says_so(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "__file__", "/srv/socketprotector.whl/socketprotector/launch/cli.py")

    refused(
        typed("127.0.0.1:0", "--", "true"),
        111,
        "from a zip or wheel is not supported; pip install it",
    )


# -- words ---------------------------------------------------------------------


@together(
    ("words", "said"),
    [
        ([], "no LISTEN"),
        (["--", "true"], "no LISTEN"),
        (["0"], "no command; put it behind --"),
        (["0", "--"], "no command; put it behind --"),
        (["0", "./daemon", "0"], "no command; put it behind --"),
        (["--nonsense", "0", "--", "true"], "No such option"),
        (["0", "--workers"], "requires an argument"),
        (["--workers", "0", "0", "--", "true"], "--workers"),
        (["--workers", "many", "0", "--", "true"], "not a valid integer"),
        (["--settle", "soon", "0", "--", "true"], "write 500ms, 10s, 1h30m or seconds"),
        (["--settle", "-1s", "0", "--", "true"], "write 500ms"),
        (["--settle", "nan", "0", "--", "true"], "write 500ms"),
        (["--settle-check", "true", "0", "--", "true"], "--settle-check needs --settle TIME"),
        (
            ["--settle", "5s", "--reload-order", "stop-first", "0", "--", "true"],
            "--settle does not work with --reload-order stop-first; leave one out",
        ),
        (["--canary", "5", "0", "--", "true"], "'5' is no share: write 0.01% to 99.99%"),
        (["--canary", "100%", "0", "--", "true"], "'100%' is no share"),
        (["--canary", "0.001%", "0", "--", "true"], "'0.001%' is no share"),
        (["--canary-for", "9s", "0", "--", "true"], "--canary-for needs --canary SHARE"),
        (["--canary-at-least", "9", "0", "--", "true"], "--canary-at-least needs --canary SHARE"),
        (
            [*CANARY, "--reload-order", "stop-first", "0", "--", "true"],
            "--canary does not work with --reload-order stop-first; leave one out",
        ),
        (
            [*CANARY, *ROLLING, "0", "--", "true"],
            "--canary does not work with --reload-order rolling; leave one out",
        ),
        (
            [*CANARY, *LISTENER, "unix:/run/w", "--", "true"],
            "--canary: all new clients of unix:/run/w (a UNIX path) reach one socket, so two",
        ),
        (
            [*CANARY, *LISTENER, "0", "unix:@w", "--", "true"],
            "all new clients of unix:@w (an abstract name) reach one socket",
        ),
        (
            [*CANARY, *LISTENER, "0?defer_accept=5", "--", "true"],
            "all new clients of 0?defer_accept=5 (?defer_accept) reach one socket",
        ),
        (["--surge", "2", "0", "--", "true"], "--surge needs --reload-order rolling"),
        (
            ["--drain-spread", "10s", "--drain-timeout", "9s", "0", "--", "true"],
            "--drain-spread 10s is longer than --drain-timeout (9s), which ends the workers",
        ),
        (
            ["--drain-spread", "31s", "--reload-order", "stop-first", "0", "--", "true"],
            "is longer than --drain-timeout (30s)",
        ),
        (
            ["--stop-spread", "31s", "0", "--", "true"],
            "--stop-spread 31s is longer than --stop-timeout (30s), which ends the workers",
        ),
        (
            ["--stop-spread", "1s", "--handoff", "stdio", "0", "--", "true"],
            "--stop-spread with --handoff stdio: only workers on the Python client library",
        ),
        (
            ["--drain-spread", "1s", *LISTENER, "0", "--", "env", "haproxy", "-db"],
            "which haproxy does not use; use its own close-spread-time instead",
        ),
        (
            ["--drain-spread", "1s", *LISTENER, "0", "--", "env", "nginx"],
            "which nginx does not use; use its own worker_shutdown_timeout instead",
        ),
        (
            ["--stop-spread", "1s", "0", "--", sys.executable, "-m", "gunicorn", "app:app"],
            "--stop-spread needs workers on the Python client library, which gunicorn does not "
            "use; use its own --graceful-timeout instead",
        ),
        (
            ["--drain-spread", "1s", *LISTENER, "0", "--", "env", "node", "x.js"],
            "which node does not use; node has no such option of its own",
        ),
        (["--keep-env", "A B", "0", "--", "true"], "'A B': write commas between names"),
        (["1=127.0.0.1:80", "--", "true"], "1=127.0.0.1:80: before = write a name of letters"),
        (["a b=80", "--", "true"], "before = write a name of letters"),
        (["1a=80", "--", "true"], "before = write a name of letters"),
        (["ä=127.0.0.1:80", "--", "true"], "before = write a name of letters"),
        ([*ROLLING, "--surge", "0", "0", "--", "true"], "write a number of workers from 1"),
        ([*ROLLING, "--surge", "0%", "0", "--", "true"], "or 1% to 100%"),
        ([*ROLLING, "--surge", "101%", "0", "--", "true"], "or 1% to 100%"),
        (
            ["--reload-order", "rolling", "0", "--", "true"],
            "finish: set --drain-timeout TIME",
        ),
        (
            ["--reload-order", "rolling", "--drain-timeout", "0", "0", "--", "true"],
            "finish: set --drain-timeout TIME",
        ),
        (
            [*ROLLING, "--handoff", "stdio", "0", "--", "true"],
            "--reload-order rolling does not work with --handoff stdio",
        ),
        (
            [*ROLLING, "--handoff", "legacy", "0", "--", "true"],
            "--reload-order rolling does not work with --handoff legacy",
        ),
        (
            [*ROLLING, *LISTENER, "0", "--", sys.executable, "-m", "gunicorn", "app:app"],
            "needs workers on the client library, which gunicorn does not use; choose start-first",
        ),
        (
            [*ROLLING, *LISTENER, "unix:/run/w", "--", "true"],
            "all new clients of unix:/run/w (a UNIX path) reach one socket",
        ),
        (
            [*ROLLING, *LISTENER, "0", "unix:@w", "--", "true"],
            "all new clients of unix:@w (an abstract name) reach one socket",
        ),
        (
            [*ROLLING, *LISTENER, "0", "web=0?defer_accept=5", "--", "true"],
            "all new clients of web=0?defer_accept=5 (?defer_accept) reach one socket",
        ),
        (
            [*ROLLING, *LISTENER, "--ready", "check:true", "0", "--", "true"],
            "needs --ready notify or a probe",
        ),
        (
            [*ROLLING, *LISTENER, "--ready", "after:1s", "0", "--", "true"],
            "needs --ready notify or a probe",
        ),
        (["--canary", "0%", "0", "--", "true"], "'0%' is no share"),
        (["--canary", "five%", "0", "--", "true"], "'five%' is no share"),
        ([*CANARY, "--canary-for", "0", "0", "--", "true"], "--canary-for"),
        ([*CANARY, "--canary-at-least", "-1", "0", "--", "true"], "--canary-at-least"),
        ([*SETTLES, "http:x", "0", "--", "true"], "write http:/path"),
        ([*SETTLES, "accept", "0", "--", "true"], "'accept' is for --ready"),
        ([*SETTLES, "after:1s", "0", "--", "true"], "'after:1s' is for --ready"),
        ([*SETTLES, "check: ", "0", "--", "true"], "there is no command"),
        ([*SETTLES, "tcp:", "0", "--", "true"], "'tcp:': neither a command nor http:/path"),
        ([*SETTLES, "reach: ", "0", "--", "true"], "'reach: ': neither a command nor http:"),
        ([*SETTLES, "http:[web]/x", "0", "--", "true"], "no listener is called web"),
        (
            [*SETTLES, "http:/x", *LISTENER, "unix:@s", "--", "true"],
            "--settle-check http:/x: the probe could reach either generation, because both share",
        ),
        (
            ["--ready", "http:/x", *LISTENER, "unix:@s", "--", "true"],
            "--ready http:/x: the probe could reach either generation, because both share",
        ),
        (["--health", "http:[web]/x", "http=0", "--", "true"], "no listener is called web"),
        (["--health", "http:x", "0", "--", "true"], "write http:/path"),
        (["--health", "http:/?x=300", "0", "--", "true"], "write http:/?x=300=200"),
        (["--ready", "http:/?x=300", "0", "--", "true"], "write http:/?x=300=200"),
        ([*SETTLES, "http:/=600", "0", "--", "true"], "600 is no status"),
        (["--health", "check:", "0", "--", "true"], "or check:COMMAND"),
        (["--health", "notify", "0", "--", "true"], "accept or check:COMMAND"),
        (["--health-every", "99ms", "0", "--", "true"], "'99ms': it must be 100ms or more"),
        (["--health-timeout", "1ms", "0", "--", "true"], "'1ms': it must be 10ms or more"),
        (["--health-every", "0", "0", "--", "true"], "'0': it must be 100ms or more"),
        (["--start-timeout", "0", "0", "--", "true"], "must be above 0"),
        (["--start-tries", "0", "0", "--", "true"], "--start-tries"),
        (["--ready", "soon", "0", "--", "true"], "write notify, ack, fd:N"),
        (["--ready", "after:", "0", "--", "true"], "write notify, ack, fd:N"),
        (["--ready", "after:x", "0", "--", "true"], "write 500ms"),
        (["--reload-order", "any", "0", "--", "true"], "start-first"),
        (["--queue", "5", "0", "--", "true"], "--queue"),
        (["--backlog", "0", "0", "--", "true"], "--backlog"),
        (["--backlog", "9" * 30, "0", "--", "true"], "--backlog"),
        (["--umask", "9", "0", "--", "true"], "is not octal"),
        (["--limit", "nofile", "0", "--", "true"], "NAME=VALUE"),
        (["--limit", "memory=1", "0", "--", "true"], "allowed: nofile, core, nice"),
        (["--limit", "nofile=x", "0", "--", "true"], "not a whole number"),
        (["--limit", "nofile=unlimited", "0", "--", "true"], "not a whole number"),
        (["--limit", "nofile=9000000000000", "0", "--", "true"], "the hard limit is"),
        (["--limit", "nice=20", "0", "--", "true"], "must be from -20 to 19"),
        (["--env", "PLAIN", "0", "--", "true"], "is not NAME=VALUE"),
        (["--env", "=x", "0", "--", "true"], "is not NAME=VALUE"),
        (["--env-file", "/no/such/file", "0", "--", "true"], "/no/such/file"),
        (["--chdir", "/no/such/folder", "0", "--", "true"], "no such directory"),
        (["--log-level", "loud", "0", "--", "true"], "debug"),
        (["--user", "no-such-user", "0", "--", "true"], "unknown user"),
        (["--user", "", "0", "--", "true"], "unknown user"),
        (["--require-user", "--user", "", "0", "--", "true"], "unknown user"),
        (["--group", "no-such-group", "0", "--", "true"], "unknown group"),
        (["70000", "--", "true"], "from 0 to 65535"),
        (["0?colour=red", "--", "true"], "unknown option colour"),
        (["udp:4321", "--", "true"], "UDP has no connections"),
        (["u4321", "--", "true"], "UDP has no connections"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(typed: Typed, words: list[str], said: str) -> None:
    ended = typed(*words)

    refused(ended, 2, re.escape(said))
    assert typed.left() == []


@together("server", sorted(known_servers.KNOWN))
def test_a_known_server_is_refused_for_a_rolling_reload_where_it_accepts(
    typed: Typed, server: str
) -> None:
    program = typed.folder / server
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    ended = typed(*ROLLING, *LISTENER, "0", "--", program, "app")

    refused(
        ended, 2, f"workers on the client library, which {server} does not use; choose start-first"
    )


@together(
    "words",
    [
        (*CANARY, "--handoff", "stdio"),
        (*CANARY, "--handoff", "legacy"),
        (*CANARY, *LISTENER),
        (*CANARY, "--settle-check", "true"),
        (*CANARY, "--drain-timeout", "0"),
        (*ROLLING, *LISTENER),
        (*ROLLING, "--surge", "100%"),
    ],
)
def test_what_a_rollout_works_with_is_accepted(typed: Typed, words: tuple[str, ...]) -> None:
    ended = typed("--check", *words, "127.0.0.1:0", "--", "true", "4321")

    assert ended.status == 0, ended
    assert typed.left() == []


def test_what_is_said_cannot_drive_the_terminal(typed: Typed) -> None:
    ended = typed("\x1b[31mred", "--", "true")

    assert ended.err.startswith(r"SocketProtector: \x1b[31mred: ")


@needs_root
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--worker-user", "nobody"], "--worker-user needs --user"),
        (
            ["--user", "games", "--worker-user", "no-such-user"],
            "--worker-user no-such-user: unknown user",
        ),
    ],
)
def test_a_user_for_workers_that_cannot_be_is_refused(
    typed: Typed, words: list[str], said: str
) -> None:
    ended = typed(*words, "unix:s", "--", "true")

    refused(ended, 2, said)
    assert typed.left() == []


@pytest.mark.parametrize(
    "text", ["A\n", "A=1\n=2\n", "A='1\n", "9A=1\n"], ids=["bare", "nameless", "open", "digit"]
)
def test_an_env_file_with_a_mistake_is_refused_with_its_line(typed: Typed, text: str) -> None:
    file = typed.folder / "settings"
    file.write_text(text)

    ended = typed("--env-file", "settings", "0", "--", "true")

    refused(ended, 2, f"{file} line {text.count(chr(10))}: ")


def test_what_cannot_be_watched_is_refused(typed: Typed) -> None:
    ended = typed("-f", "--watch", "nowhere", "127.0.0.1:0", "--", "true")

    assert ended == Ended(2, "", "SocketProtector: --watch nowhere: No such file or directory\n")


def test_without_watchfiles_it_says_what_to_install(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)

    ended = typed("-f", "--watch", ".", "127.0.0.1:0", "--", "true")

    said = "--watch .: watchfiles is not installed; pip install 'socketprotector[watch]'"
    assert ended == Ended(2, "", f"SocketProtector: {said}\n")


# -- listeners -----------------------------------------------------------------


def test_a_host_that_does_not_resolve_is_refused(typed: Typed, mode: tuple[str, ...]) -> None:
    ended = typed(*mode, "no-such-host.invalid:0", "--", "true")

    refused(ended, 111, "cannot resolve no-such-host.invalid", "check the name")
    assert typed.left() == []


def test_an_address_that_no_interface_has_is_refused(typed: Typed) -> None:
    ended = typed("192.0.2.77:0", "--", "true")

    refused(ended, 111, "Cannot assign requested address", "freebind=1")
    assert typed.left() == []


@together(
    ("address", "advice"),
    [
        ("[::ffff:127.0.0.1]:0", r"write the IPv4 address as such, or add \?v6only=0"),
        ("[ff02::1%lo]:0", "check the address and its options"),
    ],
)
def test_an_address_that_the_kernel_finds_invalid_gets_fitting_advice(
    typed: Typed, address: str, advice: str
) -> None:
    refused(typed("--check", address, "--", "true"), 111, "Invalid argument", advice)


def test_what_was_bound_before_the_one_that_fails_is_given_back(
    typed: Typed, free_port: Callable[[], int]
) -> None:
    port = free_port()

    ended = typed(f"127.0.0.1:{port}", "unix:s", "unix:no/such/folder", "--", "true")

    refused(ended, 111, "cannot listen on unix:no/such/folder: No such file or directory")
    assert typed.left() == []
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("words", ["udp:53", "u53", "127.0.0.1:53/udp"])
def test_udp_is_refused_in_one_honest_line(typed: Typed, words: str) -> None:
    ended = typed(words, "--", "true")

    assert ended.status == 2
    assert ended.lines == [
        f"SocketProtector: {words}: UDP has no connections to hand over; "
        "let the daemon bind this address"
    ]


@together(
    ("options", "said"),
    [
        ("mode=9", "octal, like 0660"),
        ("mode=1777", "octal, like 0660"),
        ("user=no-such-user", "unknown user no-such-user"),
        ("group=no-such-group", "unknown group no-such-group"),
        ("v6only=1", "unknown option v6only; allowed: backlog, group, mode, nonblock, user"),
    ],
)
def test_a_mistake_in_a_unix_sockets_options_is_refused(
    typed: Typed, options: str, said: str
) -> None:
    ended = typed(f"unix:s?{options}", "--", "true")

    refused(ended, 2, said)
    assert typed.left() == []


def test_a_path_that_is_too_long_is_refused(typed: Typed) -> None:
    refused(typed(f"unix:{'x' * 200}", "--", "true"), 2, "107 bytes at most")


def test_a_live_socket_with_a_full_backlog_is_not_stolen(typed: Typed) -> None:
    path = typed.folder / "live"
    with socket.socket(socket.AF_UNIX) as theirs, socket.socket(socket.AF_UNIX) as client:
        theirs.bind(str(path))
        theirs.listen(0)
        client.connect(str(path))

        refused(typed("unix:live", "--", "true"), 111, "has it")

        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "link to a socket", "datagram socket"])
def test_what_is_no_stale_socket_is_not_replaced(typed: Typed, kind: str) -> None:
    path = typed.folder / "there"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as theirs:
        if kind == "file":
            path.write_text("precious")
        elif kind == "link to a socket":
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(typed.folder / "stale"))
            path.symlink_to("stale")
        else:
            theirs.bind(str(path))
        before = path.lstat().st_ino

        refused(typed("unix:there", "--", "true"), 111)

        assert path.lstat().st_ino == before


def test_a_priority_cannot_be_had_where_the_workers_accept(typed: Typed) -> None:
    ended = typed(*LISTENER, "--check", "0?priority=3", "--", "true")

    refused(ended, 2, "[?]priority= does not work with --handoff listener; set SO_PRIORITY")


# -- the command, and files ----------------------------------------------------


def test_a_command_that_is_not_in_the_path_is_refused(typed: Typed) -> None:
    ended = typed("127.0.0.1:0", "--", "no-such-daemon-anywhere")

    refused(ended, 2, "cannot run no-such-daemon-anywhere: not found in PATH")
    assert typed.left() == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_command_that_is_not_executable_is_refused(typed: Typed, kind: str) -> None:
    daemon = typed.folder / "daemon"
    daemon.mkdir() if kind == "folder" else daemon.touch()

    ended = typed("127.0.0.1:0", "--", "./daemon")

    reason = ("it is a directory",) if kind == "folder" else ("not executable", r"chmod \+x")
    refused(ended, 2, f"cannot run .*/daemon: {reason[0]}", *reason[1:])
    assert typed.left() == ["daemon"]


def test_a_current_directory_that_is_gone_is_refused(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = typed.folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setenv("PWD", str(gone))
    gone.rmdir()

    ended = typed("127.0.0.1:0", "--", "true")

    refused(ended, 111, "the current directory is gone", "cd to another directory")
    assert typed.left() == []


def test_passed_sockets_of_another_process_are_named_with_both(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `sh -c 'SocketProtector ...; ...'`: the shell has the pid."""
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")

    ended = typed("fd:web", "--", "true")

    refused(
        ended,
        2,
        rf"fd:web: the passed sockets are for process 1 \(LISTEN_PID\), but this is {os.getpid()}; "
        "a shell that starts SocketProtector must exec it",
    )


def test_a_directory_at_a_unix_path_is_refused_as_one(typed: Typed) -> None:
    (typed.folder / "s").mkdir()

    ended = typed("unix:s", "--", "true")

    refused(ended, 111, "cannot listen on unix:s: a directory is there; remove it, or choose")


def test_a_pwd_that_names_another_or_no_directory_is_not_used(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("/", "/nowhere", "nul\x01"):
        monkeypatch.setenv("PWD", name)
        assert preflight.working_directory() == os.getcwd()


def test_a_current_directory_that_may_not_be_entered_is_refused(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def closed(path: Any, **more: Any) -> os.stat_result:
        if path == ".":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, **more)

    monkeypatch.setattr(os, "stat", closed)
    monkeypatch.setenv("PWD", str(typed.folder))

    ended = typed("127.0.0.1:0", "--", "true")

    refused(ended, 111, "the current directory cannot be entered", "cd to another directory")


@pytest.mark.parametrize("option", ["--pid-file", "--log-file"])
def test_a_file_in_a_folder_that_is_not_there_is_refused(
    typed: Typed, option: str, mode: tuple[str, ...]
) -> None:
    ended = typed(*mode, option, "no/such/file", "unix:s", "--", "true")

    refused(ended, 111, f"{option[2:].replace('-', ' ')} .*/no/such/file", "and its permissions")
    assert typed.left() == []


def test_a_folder_in_the_place_of_a_log_file_is_refused(typed: Typed) -> None:
    (typed.folder / "folder").mkdir()

    ended = typed("--log-file", "folder", "unix:s", "--", "true")

    refused(ended, 111, "cannot write the .*/folder", "and its permissions")
    assert typed.left() == ["folder"]


# -- what the pid file would replace ---------------------------------------------


@pytest.mark.parametrize("check", [(), ("--check",)], ids=["start", "check"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "link", "device"])
def test_what_is_no_regular_file_is_never_replaced_by_a_pid_file(
    typed: Typed, kind: str, check: tuple[str, ...]
) -> None:
    path = typed.folder / "pid"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path = Path(os.devnull)
    before = path.lstat()

    ended = typed(*check, "--pid-file", path, "unix:s", "--", "true")

    said = "is a symbolic link" if kind == "link" else "is no regular file"
    refused(ended, 2, f"the pid file {path} {said}")
    assert os.path.samestat(path.lstat(), before)


@together(
    "content",
    ["precious", "12 34", "-5", "\0", "1\n\n", "1\n2\n", " 1\n", "9" * 33, "\u0663", "1" * 99],
)
def test_a_file_with_other_content_is_never_replaced_by_a_pid_file(
    typed: Typed, content: str
) -> None:
    path = typed.folder / "pid"
    path.write_text(content)

    ended = typed("--check", "--pid-file", path, "unix:s", "--", "true")

    refused(ended, 2, f"the pid file {path} has other content than a process ID")
    assert path.read_text() == content


@together("content", ["", "1", "1\n", "9" * 31 + "\n", "9" * 32])
def test_a_stale_pid_file_may_be_replaced(typed: Typed, content: str) -> None:
    path = typed.folder / "pid"
    path.write_text(content)

    ended = typed("--check", "--pid-file", path, "unix:s", "--", "true")

    assert ended.status == 0, ended
    assert path.read_text() == content, "--check changes nothing"


@together(
    ("option", "there"),
    [
        ("--log-file", True),
        ("--log-file", False),
        ("--env-file", True),
        ("--config", True),
        ("--control", False),
        ("", False),
    ],
)
def test_a_file_of_another_option_is_never_replaced_by_a_pid_file(
    typed: Typed, option: str, there: bool
) -> None:
    folder = typed.folder / f"of{option}{there}"
    folder.mkdir()
    file, link = folder / "file", typed.folder / f"link{option}{there}"
    link.symlink_to(folder)  # another name for the same
    if there:
        file.touch()
    words = (option, file) if option else (f"unix:{file}",)

    ended = typed("--check", "--pid-file", link / "file", *words, "unix:s", "--", "true")

    named = option or f"unix:{file}"
    refused(ended, 2, f"the pid file {link}/file is also the file of {named}, and would be")
    assert file.exists() == there


NUMBERS = [each for each in options.OPTIONS if not each.is_flag and each.type.name in MEASURES]
TOO_LONG = ("9" * 400, "9" * 5000, "1e400", "-1", "nan", "inf", "9" * 400 + "h", "²")


@together("option", [each.opts[0] for each in NUMBERS])
def test_a_number_that_is_none_is_one_line(option: str) -> None:
    for value in TOO_LONG:
        with pytest.raises(UsageError) as refused:
            cli.parse(["--check", f"{option}={value}", "127.0.0.1:0", "--", "true"])
        assert f"Invalid value for '{option}'" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 300, value[:10]
        assert "4300" not in str(refused.value)


@together(
    "address", ["127.0.0.1:{}", "{}", "unix:s?user={}", "unix:s?group={}", "80?backlog={}", "u{}"]
)
def test_an_address_with_a_number_that_is_none_is_one_line(address: str) -> None:
    for value in ("9" * 400, "9" * 5000, "4294967295"):
        with pytest.raises(UsageError) as refused:
            cli.parse(["--check", address.format(value), "--", "true"])
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600, value[:10]


def test_a_number_in_a_file_with_too_many_digits_is_refused_with_its_line(typed: Typed) -> None:
    file = typed.folder / "long.toml"
    file.write_text(f'listen = "unix:s"\nworkers = {"9" * 5000}\ncommand = ["true"]\n')

    refused(typed("--config", file), 2, f"{file} line 2: a number has too many digits")


@pytest.mark.parametrize(
    ("limit", "least"), [(0, 0), (23, -3), (40, -20), (resource.RLIM_INFINITY, -20)]
)
def test_a_nice_value_below_0_needs_root_or_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int, least: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))

    assert option_values.limit("nice", str(least)) == least
    with pytest.raises(UsageError, match="RLIMIT_NICE raised" if least > -20 else "from -20"):
        option_values.limit("nice", str(least - 1))


@together("wanted", ["", "many", "1024", "9" * 5000])
def test_any_number_is_a_limit_of_the_workers_descriptors(wanted: str) -> None:
    """Python reads no number of more than 4,300 digits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = {"1024": min(1024, hard), "9" * 5000: hard}.get(wanted, soft)

    assert option_values.nofile_of_workers({"SOCKETPROTECTOR_NOFILE": wanted}) == limit


@together("size", ["1", "100", "1023K", "1000000"])
def test_a_size_that_no_worker_stays_below_is_refused(typed: Typed, size: str) -> None:
    ended = typed("--check", "--max-memory", size, "unix:s", "--", "true")

    refused(ended, 2, f"'{size}' is less than any worker needs; write 500M, 2G or 0 for never")


@together("kind", ["file", "folder", "fifo", "device", "link"])
def test_a_control_socket_replaces_no_other_file(typed: Typed, kind: str) -> None:
    path = typed.folder / kind
    match kind:
        case "file":
            path.write_text("kept")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/null")
        case "link":
            path.symlink_to("nowhere")

    ended = typed("--check", "--control", path, "unix:s", "--", "true")

    refused(ended, 2, f"--control {path}: a file that is no socket is there; remove it")


@together("option", ["--config", "--env-file", "--log-file", ""])
def test_a_control_socket_is_not_the_file_of_another_option(typed: Typed, option: str) -> None:
    file, link = typed.folder / f"other{option}", typed.folder / f"linked{option}"
    link.symlink_to(typed.folder)
    words = (option, file) if option else (f"unix:{file}",)
    if option:
        file.touch()

    ended = typed("--check", "--control", link / file.name, *words, "unix:s", "--", "true")

    named = option or f"unix:{file}"
    refused(ended, 2, f"--control {link / file.name} is also the file of {named}; give each")


@together("option", ["--config", "--env-file", "", "the command"])
def test_log_lines_are_written_into_no_file_of_another_option(typed: Typed, option: str) -> None:
    file, link = typed.folder / f"logged{option}", typed.folder / f"to{option}"
    link.symlink_to(typed.folder)
    words: tuple[str | Path, ...] = (f"unix:{file}",) if not option else ()
    program: str | Path = "true"
    if option == "the command":
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
        program = file
    elif option:
        file.touch()
        words = (option, file)

    ended = typed("--check", "--log-file", link / file.name, *words, "unix:s", "--", program)

    named = option or f"unix:{file}"
    refused(ended, 2, f"the log file {link / file.name} is also the file of {named}, which log")


@together("name", ["a/b", "/", ".", ".."])
def test_a_name_is_no_path(typed: Typed, name: str) -> None:
    ended = typed("--check", "--name", name, "unix:s", "--", "true")

    refused(ended, 2, f"--name {name}: no instance can have this name")


@together("spelling", ["{0}/twice", "{0}/./twice", "{0}//twice", "{0}/../{1}/twice", "{2}/twice"])
def test_one_socket_file_is_refused_twice_however_it_is_spelled(
    typed: Typed, spelling: str
) -> None:
    link = typed.folder / "same"
    if not link.is_symlink():
        link.symlink_to(typed.folder)
    other = "unix:" + spelling.format(typed.folder, typed.folder.name, link)

    ended = typed("--check", f"unix:{typed.folder}/twice", other, "--", "true")

    both = f"both are unix:{typed.folder}/twice; leave one of them out"
    refused(ended, 2, f"cannot listen on {other} beside unix:{typed.folder}/twice: {both}")


# -- handoff modes -------------------------------------------------------------


@together(
    ("words", "said"),
    [
        (
            ("127.0.0.1:0", "--", "true", "{fd:web}"),
            "{fd:web}: no listener has this name; there is: ",
        ),
        (
            ("a=127.0.0.1:0", "a=127.0.0.2:0", "--", "true", "{fd:a}"),
            "{fd:a}: a stands for 2 listeners",
        ),
        (
            ("--ready", "fd:3", "127.0.0.1:0", "--", "true"),
            "--ready fd:3: a listener has this number",
        ),
        (
            ("--drain-signal", "KILL", "127.0.0.1:0", "--", "true"),
            "cannot be caught, so a worker could not finish",
        ),
        (
            ("--drain-signal", "NONE", "127.0.0.1:0", "--", "true"),
            "'NONE' is not a signal; write a name such as TERM or QUIT",
        ),
    ],
)
def test_what_cannot_be_where_workers_accept_is_refused(
    typed: Typed, words: tuple[str, ...], said: str
) -> None:
    refused(typed(*LISTENER, *words), 2, re.escape(said))


@pytest.mark.parametrize(
    ("listens", "words", "said"),
    [
        (("a=127.0.0.1:PORT", "a=unix:s"), ("{fd:a}",), "a stands for 2 listeners (tcp:127.0.0.1:"),
        (("PORT?v6only=1",), ("{fd:PORT}",), "stands for 2 listeners (tcp:0.0.0.0:"),
        (("http=PORT",), ("{fd:htpp}",), "no listener has this name; there is: http;"),
        (("PORT",), ("$(circus.sockets.web)",), "no listener has this name"),
        (("PORT", "unix:s"), ("--ready", "fd:4"), "choose 5 or above"),
    ],
)
def test_check_refuses_a_name_as_a_start_does(
    typed: Typed,
    free_port: Callable[[], int],
    listens: tuple[str, ...],
    words: tuple[str, ...],
    said: str,
) -> None:
    if "v6only" in listens[0] and not socket.has_dualstack_ipv6():
        needs.skip("IPv6")
    port = str(free_port())
    options = words if words[0] == "--ready" else ()
    command = ("--", "true", *(() if options else words))
    given = [each.replace("PORT", port) for each in (*LISTENER, *options, *listens, *command)]

    checked = typed("--check", *given)
    started = typed(*given)

    assert said in checked.err
    assert checked == started
    refused(started, 2)
    assert typed.left() == []


@together(
    ("words", "said"),
    [
        (
            ("--handoff", "magic"),
            "'magic' is not one of 'connection', 'listener', 'stdio', 'legacy'",
        ),
        (("--drain-signal", "QUIT"), "it needs --handoff listener"),
        (("--shell",), "it needs --handoff stdio"),
        (
            ("--handoff", "stdio", "--retire-after", "5"),
            "only workers on the client library",
        ),
        (("--handoff", "stdio", "--ready", "ack"), "the adapter reports when it is ready"),
        (("--handoff", "legacy", "unix:s"), "works with a port alone"),
    ],
)
def test_what_needs_another_mode_says_which(
    typed: Typed, words: tuple[str, ...], said: str
) -> None:
    refused(typed(*words, "127.0.0.1:0", "--", "true"), 2, said)


def test_a_placeholder_without_listeners_names_the_mode(typed: Typed) -> None:
    ended = typed("http=127.0.0.1:0", "--", "true", "{fd:http}")

    assert ended.status == 2
    assert ended.lines == ["SocketProtector: {fd:http} in the command: it needs --handoff listener"]


# -- check ---------------------------------------------------------------------


def test_check_takes_a_name_that_stands_for_one_listener(typed: Typed) -> None:
    listens = ("http=0", "a=127.0.0.1:0", "b=unix:s?mode=0600")
    names = ("{fd:http}", "{fd:A}", "{fd:b}", "{fd:ready}")

    ended = typed("--check", *LISTENER, *listens, "--", "true", *names)

    assert (ended.status, ended.err) == (0, "")
    assert "would start" in ended.out
    assert typed.left() == []


def test_what_is_for_the_shell_is_no_path(typed: Typed) -> None:
    text = "read line; printf HTTP/1.0"

    ended = typed("--check", "--handoff", "stdio", "--shell", "127.0.0.1:0", "--", text)

    assert (ended.status, ended.err) == (0, "")
    assert f"would start {text} on " in ended.out


def test_check_says_why_it_would_not_start(typed: Typed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = typed("--check", f"127.0.0.1:{port}", "--", "true")

    refused(ended, 111, "Address already in use")
    assert typed.left() == []


def test_check_says_all_mistakes_of_a_configuration_file(typed: Typed) -> None:
    (typed.folder / "bad.toml").write_text('workers = 0\ncolour = "red"\n')

    ended = typed("--check", "--config", "bad.toml")

    assert ended.status == 2
    file = typed.folder / "bad.toml"
    assert ended.lines == [
        f"SocketProtector: {file} line 1: workers: 0 is not in the range 1<=x<=1000000",
        f"{file} line 2: colour: unknown key; docs/reference.md lists them",
    ]


def test_check_says_that_a_configuration_file_is_valid(typed: Typed) -> None:
    file = typed.folder / "web.toml"
    file.write_text('listen = "127.0.0.1:0"\ncommand = ["true"]\n')

    ended = typed("--check", "--config", "web.toml")

    assert ended.status == 0, ended
    assert f"{file} is valid; would start" in ended.out


@pytest.mark.parametrize("asked", [["--ready", "http:/x"], [*SETTLES, "http:/x"]])
def test_a_question_is_refused_once_it_is_known_that_there_is_no_second_socket(
    asked: list[str],
) -> None:
    """Under --settle-check each reload would be rolled back."""
    found = cli.parse([*asked, *LISTENER, "0", "--", "true"])
    assert isinstance(found, ParsedOptions)
    settings = replace(found.settings, listeners=(ListenerSettings("tcp:127.0.0.1:80", text="80"),))

    check_siblings(settings, {0})
    with pytest.raises(UsageError, match=f"{asked[-2]} http:/x: .* of 80 "):
        check_siblings(settings, ())


@pytest.mark.parametrize("asked", [CANARY, ROLLING])
def test_a_share_is_refused_once_it_is_known_that_there_is_no_second_socket(
    asked: tuple[str, ...],
) -> None:
    found = cli.parse([*asked, *LISTENER, "0", "--", "true"])
    assert isinstance(found, ParsedOptions)
    settings = replace(found.settings, listeners=(ListenerSettings("tcp:127.0.0.1:80", text="80"),))

    rollout_checks.check_siblings(settings, {0})
    with pytest.raises(UsageError, match=f"{asked[0]}.*: .* of 80 .passed in without"):
        rollout_checks.check_siblings(settings, ())


def test_an_address_in_use_is_refused_in_one_line_without_memory_to_say_by_whom(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("psutil.net_connections", fails)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = typed(f"127.0.0.1:{port}", "--", "true")

    refused(ended, 111, "Address already in use; another program has it: stop that program")


def test_a_path_with_a_line_break_is_refused_in_one_line(typed: Typed) -> None:
    ended = typed("--chdir", "a\nb", "1", "--", "true")

    refused(ended, 2, r"--chdir \S*a\\nb: no such directory")


def test_too_low_a_limit_of_file_sizes_is_noticed(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = resource.getrlimit

    def limited(which: int) -> tuple[int, int]:
        return (1 << 20, 1 << 20) if which == resource.RLIMIT_FSIZE else real(which)

    monkeypatch.setattr(resource, "getrlimit", limited)

    ended = typed("--check", "127.0.0.1:0", "--", "true")

    assert ended.status == 0
    assert "the limit of 1048576 bytes for files (ulimit -f" in ended.err


def test_each_socket_file_is_looked_for_a_few_times_however_many_there_are(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each pair, 1,000 listeners took 50 s."""
    real, asked = os.path.realpath, []

    def counted(path: str, **more: bool) -> str:
        asked.append(path)
        return real(path, **more)

    monkeypatch.setattr("os.path.realpath", counted)

    ended = typed("--check", *(f"unix:s{number}?mode=0600" for number in range(50)), "--", "true")

    assert ended.status == 0, ended
    assert len(asked) < 50 * 10
