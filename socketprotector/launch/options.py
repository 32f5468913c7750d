"""Every option, once: the command line, the configuration file, what a reload compares, the manual
page and docs/reference.md are made from this table (the latter two by tools/reference.py).

A new option is a row here and the field of Settings that it names; where its value is not simply
that of the field, resolve.py makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

from ..model.frozen import frozen
from ..model.handoff import MODES
from ..model.log_format import FORMATS, LEVELS
from ..model.settings import Identity
from ..system.channel import SMALLEST_QUEUE
from .option_values import (
    FLAG,
    NAMES,
    OCTAL,
    PAIR,
    READY,
    SHARE,
    SIGNAL,
    SIZE,
    TEXT,
    TIME,
    TIME_ABOVE_0,
)

#: What a reload that reads a file does with another value, where it is not said in words.
CHANGES, STAYS = "changes", "stays"
_LINE_ONLY = "for the command line only"
#: More is a mistake, and would not fit the system calls.
_MANY = 1_000_000


@frozen
class Option:
    """What there is to know of one option."""

    name: str  # without dashes; in a file it is the key
    kind: Any  # how a value is read
    default: str | int | None
    help: str  # for --help; lines after the first are for the manual and the reference
    field: str = ""  # the field of Settings that it decides, as "policy.settle_s"
    at_reload: str = CHANGES
    unset: str = ""  # what holds without it, where no value says that
    metavar: str = ""
    short: str = ""
    repeated: bool = False
    no_key: str = ""  # why it is not for a file; "": it is
    former: str = ""  # its name before, which works until 1.0
    show: Callable[[Any], str] | None = None  # a field's value for people

    @property
    def parameter(self) -> str:
        """What click calls it."""
        return self.name.replace("-", "_")

    @property
    def brief(self) -> str:
        """What --help says."""
        default = f"  [default: {self.unset}]" if self.unset else ""
        return self.help.partition("\n")[0] + default

    @property
    def written(self) -> str:
        """How its value is written, `TIME`; "" for one that has none."""
        if isinstance(self.kind, click.Choice):
            return "|".join(self.kind.choices)
        if self.kind is FLAG:
            return ""
        number = isinstance(self.kind, click.types.IntParamType)
        return self.metavar or ("N" if number else str(self.kind.name))

    def shown(self, value: Any) -> str:
        """Return a value of the field for people."""
        if self.show is not None:
            return self.show(value)
        if value is None:
            return "none"
        text: str = getattr(self.kind, "show", str)(value)
        return text.lower() if self.kind is FLAG else text

    def as_click(self, **more: Any) -> click.Option:
        """Return it as click has it."""
        names = [f"--{self.name}", *([f"-{self.short}"] if self.short else [])]
        if self.kind is FLAG:
            return click.Option(names, is_flag=True, help=self.brief, **more)
        if self.default is not None:
            more["default"] = self.default
        if not isinstance(self.kind, click.Choice):
            more["metavar"] = self.written
        return click.Option(names, type=self.kind, multiple=self.repeated, help=self.brief, **more)


def _user(found: Identity | None) -> str:
    return f"{found.user} (group {found.gid})" if found else "none"


# fmt: off
GROUPS: Mapping[str, Sequence[Option]] = {
    "This instance": (
        Option("config", TEXT, None, metavar="FILE", no_key=_LINE_ONLY,
               help="TOML file with options, read again at each reload.\n"
                    "LISTEN and COMMAND may stand there, too. What the command line says overrides "
                    "it. See docs/config.md."),
        Option("name", TEXT, None, "Name of this instance.\n"
               "It stands in status, log, syslog, ps and metrics, and socketprotectorctl --name "
               "finds by it.", "name", STAYS, "the command's", "NAME"),
        Option("pid-file", TEXT, None, "Write the protector's process ID to this file.\n"
               "The file is locked as long as the protector lives, so that a second one is refused "
               "and a stale file replaced.", "pid_file", STAYS, metavar="FILE"),
        Option("foreground", FLAG, None, "Do not detach.", "foreground", STAYS, short="f"),
        Option("guard", FLAG, None,
               "Run under a small parent that restarts a protector that dies.\n"
               "The parent holds the descriptors meanwhile, so that nothing is closed.",
               "guarded", STAYS),
        Option("check", FLAG, None, "Say whether it would start, and start nothing.",
               no_key=_LINE_ONLY),
        Option("control", TEXT, None, "Path of the control socket.",
               at_reload=STAYS, metavar="PATH",
               unset="NAME.control in $XDG_RUNTIME_DIR/socketprotector, root's in "
                     "/run/socketprotector"),
        Option("no-control", FLAG, None, "Have no control socket.", at_reload=STAYS),
        Option("control-group", TEXT, None, "Let members of this group use the control socket.",
               "control_group", STAYS, metavar="GROUP"),
        Option("watch", TEXT, None, "Reload when files below this path change. Repeatable.\n"
               "For development; see docs/watch.md.", metavar="PATH", repeated=True,
               no_key=_LINE_ONLY),
        Option("version", None, None, "Show the version and exit.", no_key=_LINE_ONLY),
        Option("help", None, None, "Show this message and exit.", no_key=_LINE_ONLY),
    ),
    "Workers": (
        Option("handoff", click.Choice(MODES), "connection",
               "How connections reach a worker; see docs/handoff.md.\n"
               "connection: it takes them from a queue. listener: it accepts them itself, from the "
               "listening socket that it is given (unmodified servers). stdio: a program for each, "
               "as its stdin and stdout. legacy: as the C++ SocketProtector handed them over.",
               "handoff", STAYS),
        Option("shell", FLAG, None, "With --handoff stdio: run COMMAND by /bin/sh -c.", "shell"),
        Option("workers", click.IntRange(1, _MANY), None,
               "Worker processes; with --handoff stdio programs that run at once.\n"
               "What signals TTIN and TTOU made of it stays until the file says another number.",
               "workers", unset="1; 4 with --handoff stdio"),
        Option("ready", READY, None,
               "How a worker shows that it is ready.\n"
               "notify: it sends READY=1. ack: it sends einhorn's ACK. fd:N: it writes a line to "
               "descriptor N. check:CMD: this command succeeds. after:TIME: it has lived so long.",
               unset="notify; with --handoff listener what comes first of notify, ack, fd and 1 s"),
        Option("start-timeout", TIME_ABOVE_0, "60s", "Time allowed to become ready.",
               "policy.start_timeout_s"),
        Option("start-tries", click.IntRange(1), 3,
               "Attempts at the first start, if the worker exits before it is ready.",
               "policy.start_tries", "changes; it counts at the first start alone"),
        Option("watchdog", TIME, "0",
               "Replace a worker that has sent WATCHDOG=1 and then nothing for this time; 0: "
               "never.\nThe client library sends it from the loop that serves.", "watchdog_s"),
        Option("retire-after", SHARE, None,
               "Replace a worker after N connections, varied by up to J.\n"
               "Its replacement starts first.", former="max-requests"),
        Option("max-memory", SIZE, None, "Replace a worker above this memory size: 500M, 2G.\n"
               "Its replacement starts first.", "worker_limits.memory_bytes"),
        Option("max-age", TIME, "0", "Replace a worker of this age; 0: never.\n"
               "Its replacement starts first.", "worker_limits.age_s"),
    ),
    "Reload and stop": (
        Option("reload-order", click.Choice(["start-first", "stop-first"]), "start-first",
               "Start the new workers before the old ones stop, or after.\n"
               "stop-first is for a daemon that holds something exclusive; clients wait meanwhile.",
               "policy.stop_first", show=lambda first: "stop-first" if first else "start-first"),
        Option("settle", TIME, "0",
               "Keep the old generation on standby this long after the switch.\n"
               "If the new one fails within this time, the old one serves again.",
               "policy.settle_s"),
        Option("drain-signal", SIGNAL, None,
               "With --handoff listener: the signal that tells a worker to finish.",
               "drain_signal", unset="TERM"),
        Option("drain-timeout", TIME, "0",
               "Time an old generation has to finish its connections, then TERM; 0: no limit.",
               "policy.drain_timeout_s"),
        Option("max-draining", click.IntRange(0), 0,
               "Old generations that may drain at a time; above it the oldest ends; 0: no limit.",
               "policy.max_draining"),
        Option("stop-timeout", TIME, "30s", "Time allowed for a graceful stop, then TERM.",
               "policy.stop_timeout_s"),
        Option("kill-timeout", TIME, "5s", "Time from TERM to KILL.", "policy.kill_timeout_s"),
    ),
    "Connections": (
        Option("backlog", click.IntRange(1, _MANY), 4096,
               "Connections that may wait in the kernel, for each listener.",
               at_reload="holds for listeners that are added"),
        Option("queue", click.IntRange(SMALLEST_QUEUE, _MANY), 256,
               "Connections sent to the workers that none has taken yet, at most.", "queue"),
        Option("busy-poll", TIME, "200us",
               "Wait awake this long for the next connection while they come one by one; 0: sleep "
               "at once.\nIt lowers the latency by 30 % for one processor's time, and is used only "
               "where there is more than one.", "busy_poll_s", STAYS),
    ),
    "Users and privileges": (
        Option("user", TEXT, None, "Run as this user once the sockets are bound.\n"
               "It needs root.", "identity", STAYS, metavar="USER", show=_user),
        Option("group", TEXT, None, "Group to run as.", at_reload=STAYS, metavar="GROUP",
               unset="the user's"),
        Option("worker-user", TEXT, None, "Run the workers as this user instead; needs --user.\n"
               "The protector keeps CAP_SETUID, CAP_SETGID and CAP_KILL; only then is it isolated "
               "from them.", "worker_identity", STAYS, metavar="USER",
               show=_user),
        Option("require-user", FLAG, None, "Refuse to be root unless --user says so.\n"
               "For units and scripts.", no_key=_LINE_ONLY),
        Option("no-new-privs", FLAG, None,
               "Let no set-user-ID program gain privileges, here and in the workers.",
               "no_new_privileges", STAYS),
    ),
    "Environment of the workers": (
        Option("chdir", TEXT, None, "Directory where workers start.\n"
               "A symbolic link in it is followed at each reload.", "directory", metavar="DIR",
               unset="the caller's"),
        Option("umask", OCTAL, None, "Their umask.", "umask", unset="the caller's"),
        Option("limit", PAIR, None, "A resource limit: nofile, core or nice. Repeatable.",
               metavar="NAME=N", repeated=True, unset="the caller's"),
        Option("env", PAIR, None, "A variable. Repeatable.\n"
               "ps shows arguments: secrets belong in a file.", repeated=True),
        Option("env-file", TEXT, None, "A file of NAME=VALUE lines, read again at each reload.",
               "env_file", "changes, and is read again", metavar="FILE"),
        Option("clear-env", FLAG, None, "Pass none of the caller's variables on."),
        Option("keep-env", NAMES, None, "Pass on only these of the caller's variables.\n"
               "See docs/security.md.", "keep_env", unset="all",
               show=lambda names: "all" if names is None else NAMES.show(names)),
    ),
    "Log": (
        Option("log-file", TEXT, None, "Log file of the protector and the workers.\n"
               "Where nobody listens at /dev/log, lines are lost until somebody does; the start "
               "says so.", "log_file", STAYS, "syslog, or the terminal with -f", "FILE"),
        Option("log-level", click.Choice(list(LEVELS)), "info",
               "Lowest level that is logged.", "log_level"),
        Option("verbose", FLAG, None, "Log every decision: --log-level debug.", short="v",
               no_key='write log-level = "debug"'),
        Option("log-format", click.Choice(FORMATS), "text", "Format of each line.\n"
               "text: key=value, in colour on a terminal unless NO_COLOR is set. json: one object "
               "a line.", "log_format", STAYS),
        Option("log-prefix", FLAG, None,
               "Begin each line of a worker with [GENERATION PID].", "log_prefix", STAYS),
        Option("no-log-relay", FLAG, None,
               "Let workers write to the log file or to syslog themselves.\n"
               "Then those that run go on with the old file after a rotation, and the last words "
               "of one that failed are not known (docs/log.md).", "log_relay", STAYS,
               show=lambda relay: "false" if relay else "true"),
    ),
}
# fmt: on
OPTIONS = tuple(option for group in GROUPS.values() for option in group)
#: Names of before, with their dashes: the original program's long ones began with one.
_FORMER = {f"--{each.former}": f"--{each.name}" for each in OPTIONS if each.former}
_RENAMED = {f"-{name}": f"--{name}" for name in ("pid-file", "foreground", "verbose")} | _FORMER


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first `--`, which click would drop; give options the names that they have."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return [_renamed(word) for word in words[:at]], words[at + 1 :]


def _renamed(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{_RENAMED.get(name, name)}{equals}{value}"


def outdated(arguments: Sequence[str]) -> Iterator[str]:
    """Tell which options of a command line have another name now."""
    for name in dict.fromkeys(word.partition("=")[0] for word in arguments):
        if name == "--":
            return
        if name in _FORMER:
            yield renamed(name, _FORMER[name])


def renamed(old: str, new: str) -> str:
    """Say that an option, or a key, has another name."""
    return f"{old} is called {new} now; the old name works until 1.0"
