"""The configuration file: what it may say, and how each mistake is reported."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.launch import cli, preflight
from socketprotector.launch.option_values import FLAG, NOT_EMPTY
from socketprotector.launch.options import OPTIONS
from socketprotector.launch.resolve import ParsedOptions
from socketprotector.launch.settings_diff import forbidden
from socketprotector.model.errors import SystemRefused, UsageError
from tests.together import together

ROOT = Path(__file__).parents[2]
COMMAND = f'command = ["{sys.executable}", "-V"]\n'

#: Each option that has a key, with another value than its default.
EVERY_KEY = """
pid-file = "run/pid"
foreground = true
guard = true
name = "web"
handoff = "listener"
shell = true
drain-signal = "QUIT"
workers = 3
reload-order = "stop-first"
ready = "after:1s"
settle = 0.5
settle-check = "http:/healthz"
start-timeout = "10s"
start-tries = 4
surge = "2"
canary = "5%"
canary-for = "10s"
canary-at-least = 7
drain-timeout = 120
drain-spread = "1m"
max-draining = 5
lame-duck = "10s"
lame-duck-idle = "5s"
stop-timeout = "1m"
stop-spread = 20
kill-timeout = "500ms"
backlog = 100
queue = 512
busy-poll = "1ms"
watchdog = "10s"
health = "http:/healthz"
health-every = "1s"
health-failures = 2
health-timeout = "1s"
retire-after = "1000+-50"
max-memory = "500M"
max-age = "1h"
control = "c"
no-control = true
control-group = "nogroup"
status-group = "games"
user = "nobody"
group = "nogroup"
worker-user = "daemon"
releases = "releases"
current = "current"
deployer = "daemon"
no-new-privs = true
chdir = "."
umask = "027"
env-file = "vars"
clear-env = true
keep-env = "PATH,LANG"
log-file = "log"
log-level = "warning"
log-format = "json"
log-prefix = true
no-log-relay = true
"""


class Reader:
    """Reads a file as the command line does, and stops before anything is bound."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "web.toml"

    def __call__(self, text: str, *words: str) -> ParsedOptions:
        self.path.write_text(text)
        asked = cli.parse(["--config", str(self.path), *words])
        assert asked is not None
        return asked

    def mistakes(self, text: str, *words: str) -> list[str]:
        """What it says, without the file's name."""
        with pytest.raises(UsageError) as refused:
            self(text, *words)
        lines = str(refused.value).split("\n")
        return [line.removeprefix(f"{self.path} ") for line in lines]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


# -- what it may say ------------------------------------------------------------


def test_a_file_alone_is_enough(read: Reader, tmp_path: Path) -> None:
    asked = read(
        COMMAND
        + 'listen = ["127.0.0.1:0", "unix:s?mode=0600"]\nworkers = 4\nsettle = "2m30s"\n'
        + 'umask = "027"\n[env]\nMODE = "x=y"\nPORT = 80\n[limit]\nnofile = 100\n'
    )

    settings = asked.settings
    assert [listen.text for listen in asked.listens] == ["127.0.0.1:0", "unix:s?mode=0600"]
    assert asked.listens[1].path == str(tmp_path / "s")
    assert (settings.command, settings.workers) == ((sys.executable, "-V"), 4)
    assert settings.policy.settle_s == 150.0
    assert settings.umask == 0o027
    assert settings.environment == (("MODE", "x=y"), ("PORT", "80"))
    assert settings.limits == (("nofile", 100),)
    assert settings.name == Path(sys.executable).name


def test_workers_get_the_umask_of_the_caller_who_keeps_it(read: Reader) -> None:
    before = os.umask(0o077)
    try:
        asked = read(COMMAND + 'listen = "127.0.0.1:0"\n')
    finally:
        after = os.umask(before)

    assert (asked.settings.umask, after) == (0o077, 0o077)


def test_a_default_group_that_is_made_after_the_start_stops_no_reload(
    read: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of the exporter makes the group, perhaps later."""
    monkeypatch.setenv("SOCKETPROTECTOR_STATUS_GROUP", "not-made-yet")
    running = read(COMMAND + "listen = '1'").settings
    assert running.status_group is None

    monkeypatch.setenv("SOCKETPROTECTOR_STATUS_GROUP", "games")
    again = cli.parse(running.origin.words, running)

    assert again is not None
    assert list(forbidden(running, again.settings)) == []


def test_the_command_line_wins(read: Reader) -> None:
    asked = read(
        COMMAND
        + 'listen = "127.0.0.1:0"\nworkers = 4\nsettle = 2\nlog-level = "error"\n'
        + '[env]\nA = "file"\nB = "file"\n[limit]\nnofile = 100\ncore = 0\n',
        *("--workers", "2", "--env", "A=line", "--limit", "core=1", "-v"),
        *("127.0.0.1:1", "--", sys.executable, "-c", "0"),
    )

    settings = asked.settings
    assert [listen.text for listen in asked.listens] == ["127.0.0.1:1"]
    assert settings.command == (sys.executable, "-c", "0")
    assert settings.workers == 2
    assert settings.policy.settle_s == 2.0
    assert settings.environment == (("A", "line"), ("B", "file"))
    assert dict(settings.limits) == {"nofile": 100, "core": 1}
    assert settings.log_level == "debug"


def test_its_relative_paths_are_taken_against_its_folder(
    read: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Path("/")
    (tmp_path / "vars").touch()
    daemon = tmp_path / "daemon"
    daemon.write_text("#!/bin/sh\n")
    daemon.chmod(0o755)
    monkeypatch.setattr(preflight, "working_directory", lambda: str(elsewhere))
    text = 'listen = "unix:s"\ncommand = ["./daemon"]\nenv-file = "vars"\nlog-file = "log"\n'

    settings = read(text, "--pid-file", "pid").settings

    assert settings.command == (f"{tmp_path}/./daemon",)
    assert settings.env_file == str(tmp_path / "vars")
    assert settings.log_file == str(tmp_path / "log")
    assert settings.pid_file == "/pid"
    assert settings.directory == str(elsewhere)
    assert settings.origin.directory == str(elsewhere)


def test_every_option_has_a_key_and_every_key_its_effect(read: Reader, tmp_path: Path) -> None:
    (tmp_path / "vars").touch()
    given = [line.partition(" = ")[0] for line in EVERY_KEY.split("\n") if line]
    known = [each.key for each in OPTIONS if not each.no_key]
    plain = read(COMMAND + 'listen = "1"\n')
    plain_asked = dataclasses.replace(plain, config=None)

    assert sorted([*given, "env", "limit"]) == sorted(known)
    for line in EVERY_KEY.split("\n"):
        key = line.partition(" = ")[0]
        if key in ("", "user", "group", "worker-user"):
            continue  # these need root, and users
        if key in ("releases", "current", "deployer"):
            continue  # these need each other, and a release: test_release_choice.py
        needs = {
            "shell": 'handoff = "stdio"\n',
            "drain-signal": 'handoff = "listener"\n',
            "lame-duck-idle": 'lame-duck = "1h"\n',
            "settle-check": 'settle = "5s"\n',
            "surge": 'reload-order = "rolling"\ndrain-timeout = "1m"\n',
            "canary-for": 'canary = "5%"\n',
            "canary-at-least": 'canary = "5%"\n',
        }
        command = COMMAND if key != "shell" else f'command = ["{sys.executable}"]\n'
        one = read(f'{command}listen = "1"\n{needs.get(key, "")}{line}\n')
        same = dataclasses.replace(
            one.settings, secret=plain.settings.secret, origin=plain.settings.origin
        )
        assert dataclasses.replace(one, settings=same, config=None) != plain_asked, key


@pytest.mark.parametrize(("written", "surge"), [("2", (2, False)), ('"25%"', (25, True))])
def test_a_surge_is_a_number_or_a_string(
    read: Reader, written: str, surge: tuple[int, bool]
) -> None:
    rolling = 'reload-order = "rolling"\ndrain-timeout = "1m"\n'

    policy = read(f'{COMMAND}listen = "1"\n{rolling}surge = {written}\n').settings.policy

    assert (policy.surge, policy.surge_is_percent) == surge


@pytest.mark.parametrize("page", [pytest.param("--help", marks=pytest.mark.costly), "--help-all"])
def test_help_is_the_same_without_docstrings(page: str) -> None:
    said = [
        subprocess.run(
            [sys.executable, *flags, "-m", "socketprotector", page],
            capture_output=True,
            check=True,
        ).stdout
        for flags in ((), ("-OO",))
    ]

    assert b"Open the sockets of a daemon" in said[0]
    assert said[0] == said[1]


# -- mistakes -------------------------------------------------------------------


def test_every_mistake_is_reported_with_its_line(read: Reader) -> None:
    said = read.mistakes(
        """workers = 0
start_timeout = "x"
listen = [
  "127.0.0.1:0",
  "70000",
  "127.0.0.1:0",
  "udp:1",
]
command = ["./nodaemon", 3]
chdir = "/no/such"
umask = 0o22
verbose = true
foreground = "yes"
settle = "soon"
ready = "after:"
log-level = "loud"
user = "no-such-user"
start-tries = true
queue = 2.5
drain-timeout = nan
colour = 1
env-file = "nofile"
[env]
"A=B" = "x"
C = [1]
D = "\\u0000"
[limit]
nofile = 900000000000000000
memory = 2
[worker]
"""
    )

    assert said == [
        "line 1: workers: 0 is not in the range 1<=x<=1000000",
        "line 2: start_timeout: unknown key; did you mean start-timeout?",
        "line 5: listen: 70000: the port must be a number from 0 to 65535",
        "line 6: listen: 127.0.0.1:0: listed twice",
        "line 7: listen: udp:1: UDP has no connections to hand over; "
        "let the daemon bind this address",
        "line 9: command: 3: must be a string",
        "line 10: chdir: /no/such: no such directory",
        "line 11: umask: 18: must be a string, in quotes",
        'line 12: verbose: has no place in a file; write log-level = "debug"',
        "line 13: foreground: 'yes': must be true or false",
        "line 14: settle: 'soon' is no duration; write 500ms, 10s, 1h30m or seconds",
        "line 15: ready: 'after:': write notify, ack, fd:N (3 to 1023), accept, http:/path, "
        "check:COMMAND or after:1s",
        "line 16: log-level: 'loud' is not one of 'debug', 'info', 'warning', 'error'",
        "line 17: user: no-such-user: unknown user; see getent passwd",
        "line 18: start-tries: true: must be a whole number",
        "line 19: queue: 2.5: must be a whole number",
        "line 20: drain-timeout: 'nan' is no duration; write 500ms, 10s, 1h30m or seconds",
        "line 21: colour: unknown key; docs/reference.md lists them",
        f"line 22: env-file: {read.path.parent}/nofile: No such file or directory",
        "line 24: env.A=B: not a name; it is empty, or has = in it",
        "line 25: env.C: a list: must be a string or a whole number",
        "line 26: env.D: must not contain a NUL",
        *[line for line in said if line.startswith("line 28: limit.nofile: nofile=9000000000")],
        "line 29: limit.memory: memory: unknown; allowed: nofile, core, nice",
        "line 30: worker: unknown key; did you mean workers?",
    ]


@together(
    ("text", "said"),
    [
        ("listen = [\n", "line 1: not TOML: Invalid value"),
        ("a = 1\n\nb = = 2\n", "line 3: not TOML: Invalid value"),
        ("a = 1\na = 2\n", "line 2: not TOML: Cannot overwrite a value"),
        ("a = '" + "x" * 9, 'line 1: not TOML: Expected "\'"'),
        ("a = " + "[" * 5000, "line 1: nested too deeply"),
        ("listen = []\n", 'line 1: listen: must be a string or a list of them, like ["4321"]'),
        ("listen = 80\n", 'line 1: listen: must be a string or a list of them, like ["4321"]'),
        ('listen = [""]\n', "line 1: listen: '': must be a string"),
        (
            'command = "./d 80"\n',
            'line 1: command: must be a list of words, like ["./daemon", "4321"]',
        ),
        ("env = 1\n", "line 1: env: must be a table, like [env] and NAME = VALUE below it"),
        ("help = true\n", "line 1: help: has no place in a file; for the command line only"),
        ("config = 'x'\n", "line 1: config: has no place in a file; for the command line only"),
        ("group = 'no-such'\n", "line 1: group: no-such: unknown group; see getent group"),
        ("worker-user = 'x'\n", "line 1: worker-user: --worker-user needs --user, which "),
        (
            "settle-check = 'true'\n",
            "line 1: settle-check: --settle-check needs --settle TIME",
        ),
        ("surge = 2.5\n", "line 1: surge: 2.5: must be a string or a whole number"),
        ("surge = true\n", "line 1: surge: true: must be a string or a whole number"),
        ("surge = 0\n", "line 1: surge: '0': write a number of workers from 1, or 1% to 100%"),
        ("canary-for = 5\n", "line 1: canary-for: --canary-for needs --canary SHARE"),
        (
            "canary-at-least = 5\n",
            "line 1: canary-at-least: --canary-at-least needs --canary SHARE",
        ),
        (
            "lame-duck-idle = 5\n",
            "line 1: lame-duck-idle: --lame-duck-idle needs --lame-duck TIME",
        ),
        ("command = ['/no/such']\n", "line 1: command: cannot run /no/such: No such file"),
        ("limit.nice = -30\n", "line 1: limit.nice: nice=-30: must be from -20 to 19"),
        ("[[limit]]\nnice = 3\n", "line 1: limit: must be a table"),
        (
            "handoff = 'stdio'\nlog-prefix = true\nno-log-relay = true\n",
            "line 2: log-prefix: --log-prefix needs the log relay; leave out --no-log-relay",
        ),
        ("handoff = 'connection'\nshell = true\n", "line 2: shell: --shell with --handoff "),
        ("shell = true\n", "line 1: shell: --shell with --handoff connection: it needs "),
        ("deployer = 'root'\n", "line 1: deployer: --deployer needs --releases and --current"),
        ("env-file = ''\n", "line 1: env-file: it is empty; leave the option out, or write a "),
        ("env.kill-timeout = '9s'\n", "line 1: env.kill-timeout: the name of an option; "),
        ("[env]\nA = '1'\nworkers = 2\n", "line 3: env.workers: the name of an option; "),
        ("[env]\n\nlisten = ['80']\n", "line 3: env.listen: the name of an option; write it abov"),
    ],
)
def test_a_mistake_is_reported_with_what_is_allowed(read: Reader, text: str, said: str) -> None:
    (line,) = read.mistakes(text)

    assert line.startswith(said)


def test_a_flag_that_is_false_in_the_file_is_as_if_left_out(read: Reader) -> None:
    flags = [each.key for each in OPTIONS if each.kind is FLAG and not each.no_key]
    text = COMMAND + 'listen = "127.0.0.1:0"\n' + "".join(f"{each} = false\n" for each in flags)

    assert "shell" in flags
    assert not read(text).settings.shell


def test_no_line_is_blamed_that_the_command_line_overrides(read: Reader) -> None:
    text = COMMAND + 'handoff = "stdio"\nlog-prefix = false\nno-log-relay = true\n'

    (said,) = read.mistakes(text, "--log-prefix", "4321")

    assert said.endswith("handoff: --log-prefix needs the log relay; leave out --no-log-relay")


def test_a_mistake_of_an_address_a_name_or_a_group_does_not_hide_the_others(read: Reader) -> None:
    said = read.mistakes(
        """listen = "1?priority=5"
command = ["sleep"]
handoff = "listener"
name = "a/b"
control-group = "no-such-group"
workers = 0
"""
    )

    assert [each.partition(": ")[2].partition(":")[0] for each in said] == [
        *("listen", "name", "control-group", "workers")
    ]


def test_what_follows_from_a_mistake_is_not_reported(read: Reader) -> None:
    said = read.mistakes(
        'settle = "5 sec"\nsettle-check = "http:/"\ndrain-timeout = "x"\nlame-duck-idle = 5\n'
    )

    assert said == [
        "line 1: settle: '5 sec' is no duration; write 500ms, 10s, 1h30m or seconds",
        "line 3: drain-timeout: 'x' is no duration; write 500ms, 10s, 1h30m or seconds",
        "line 4: lame-duck-idle: --lame-duck-idle needs --lame-duck TIME",
    ]


@pytest.mark.parametrize("listen", ["", 'listen = ["b=1", "web=x:y:z"]'])
def test_a_probe_of_a_listener_that_is_missing_or_mistaken_is_no_mistake(
    read: Reader, listen: str
) -> None:
    said = read.mistakes(
        f"""{COMMAND}
{listen}
handoff = "listener"
ready = "http:[web]/x"
health = "accept"
settle = "1s"
settle-check = "http:[web]/x"
"""
    )

    assert len(said) == 1
    assert said[0].startswith("line 3: listen: web=x:y:z: " if listen else "no LISTEN; ")


def test_a_mistake_is_reported_before_an_error_of_a_default(read: Reader) -> None:
    """The default of the mistaken key is refused beside another key."""
    (said,) = read.mistakes('handoff = "listner"\ndrain-signal = "QUIT"\n')

    assert said.startswith("line 1: handoff: ")


def test_a_log_file_that_no_file_system_can_have_is_refused_before_the_start(
    read: Reader,
) -> None:
    """--check makes no file, so it must not wait for the start to find out."""
    log_file = str(read.path.parent / ("x" * 300))

    with pytest.raises(SystemRefused, match=r"cannot write the log file .*: File name too long; "):
        preflight.check_log_file(log_file, {})


def test_what_is_no_text_is_reported_with_its_line(read: Reader) -> None:
    read.path.write_bytes(b"a = 1\nb = '\xff'\n")

    with pytest.raises(UsageError, match=r"web\.toml line 2: not UTF-8"):
        cli.parse(["--config", str(read.path)])


@together(
    ("words", "said"),
    [
        (["--config", "/no/such"], "--config /no/such: No such file or directory"),
        (["--config", "/"], "--config /: Is a directory"),
        (
            ["--config", "/dev/zero"],
            "--config /dev/zero: no regular file, but it is read again later",
        ),
        (["--config", "/dev/null"], "no LISTEN; .*, or listen in /dev/null"),
        (["--config", "/dev/null", "1"], "no command; .*, or command in /dev/null"),
        (["--config", "/dev/null", "--nonsense"], "No such option"),
    ],
)
def test_what_is_missing_is_reported(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cli.parse(words)


def test_an_empty_value_on_the_command_line_is_refused() -> None:
    for key in [each.key for each in OPTIONS if each.kind is NOT_EMPTY]:
        with pytest.raises(UsageError, match=f"'--{key}': it is empty; leave the option out"):
            cli.parse([f"--{key}=", "127.0.0.1:0", "--", sys.executable])


def test_a_mistake_on_the_command_line_is_not_the_files(read: Reader) -> None:
    (line,) = read.mistakes(COMMAND + 'listen = "1"\n', "--chdir", "/no/such")

    assert line == "--chdir /no/such: no such directory"


def test_no_value_of_the_environment_is_shown(read: Reader) -> None:
    said: Callable[..., list[str]] = read.mistakes

    assert "secret" not in "".join(said('[env]\n"A=" = "secret"\nB = "secret\\u0000"\n'))
