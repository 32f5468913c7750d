"""Every option, once: the command line, the configuration file, what a reload compares, the manual
page and docs/reference.md are made from this table (the latter two by tools/reference.py).

A new option is a row here and the field of Settings that it names; where its value is not simply
that of the field, resolve.py makes it.
"""

from __future__ import annotations

import grp
import pwd
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from socketprotector_client import wire

from .. import __version__
from ..model.handoff_modes import MODES
from ..model.log_format import FORMATS, LEVELS
from ..model.settings import Identity
from .option_values import (
    FLAG,
    HEALTH,
    NAMES,
    OCTAL,
    PAIR,
    READY,
    SETTLE_CHECK,
    SHARE,
    SIGNAL,
    SIZE,
    TEXT,
    TIME,
    TIME_ABOVE_0,
    TIME_EACH,
    TIME_TO_ANSWER,
)

#: What a reload that reads a file does with another value, where it is not said in words.
CHANGES, STAYS = "changes", "stays"
#: Long options that the original program wrote with one dash.
_ONE_DASH = ("pid-file", "foreground", "verbose")
_LINE_ONLY = "for the command line only"
#: More is a mistake, and would not fit the system calls.
_MANY = 1_000_000
#: Values that this system has names for, by what stands for them in --help.
_NAMED: Mapping[str, Callable[[], list[str]]] = {
    "USER": lambda: [each.pw_name for each in pwd.getpwall()],
    "GROUP": lambda: [each.gr_name for each in grp.getgrall()],
    "SIGNAL": lambda: [
        each.name.removeprefix("SIG")
        for each in signal.Signals
        if each not in (signal.SIGKILL, signal.SIGSTOP)
    ],
}


class Option(click.Option):
    """One option: what click knows of it, and all else."""

    def __init__(
        self,
        key: str,
        kind: Any,
        text: str,
        field: str = "",
        at_reload: str = CHANGES,
        *,
        unset: str = "",
        short: str = "",
        no_key: str = "",
        show: Callable[[Any], str] | None = None,
        **more: Any,
    ) -> None:
        """key: its name without dashes, also in a file.  kind: how a value is read.  text: of
        --help; lines after the first are for the manual and the reference.  field: the one of
        Settings that it decides, as "policy.settle_s".  unset: what holds without it, where no
        default says that.  no_key: why it is not for a file.  show: makes a field's value one for
        people.  more: for click.
        """
        self.key = key
        self.kind = kind
        self.text = text
        self.field = field
        self.at_reload = at_reload
        self.unset = unset
        self.no_key = no_key
        self._show = show
        if kind is FLAG:
            more["is_flag"] = True
        else:
            more["type"] = kind
        if not isinstance(kind, click.Choice) and kind is not FLAG:
            number = isinstance(kind, click.types.IntParamType)
            more.setdefault("metavar", "N" if number else kind.name)
        brief = text.partition("\n")[0] + (f"  [default: {unset}]" if unset else "")
        super().__init__([*(f"-{each}" for each in short), f"--{key}"], help=brief, **more)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        if self.key in _ONE_DASH:
            flag = {"action": "store_const", "const": True} if self.kind is FLAG else {}
            parser.add_option(self, [f"-{self.key}"], self.name, **flag)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Return what may stand behind it, by what stands for that in --help."""
        from click.shell_completion import CompletionItem

        shown = self.metavar or ""
        if shown in ("FILE", "PATH", "DIR"):
            return [CompletionItem(incomplete, type="dir" if shown == "DIR" else "file")]
        words = _NAMED[shown]() if shown in _NAMED else re.findall(r"\b[a-z]+\b(?!:)", shown)
        found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
        return found or super().shell_complete(ctx, incomplete)

    def shown(self, value: Any) -> str:
        """Return a value of the field for people."""
        if self._show is not None:
            return self._show(value)
        if value is None:
            return "none"
        text: str = getattr(self.kind, "show", str)(value)
        return text.lower() if self.kind is FLAG else text


def _says(text: Callable[[click.Context], str]) -> Mapping[str, Any]:
    """Return what makes an option one that says something and ends the command."""

    def say(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(text(ctx))
            ctx.exit()

    return {"is_eager": True, "expose_value": False, "callback": say}


def _user(found: Identity | None) -> str:
    return f"{found.user} (group {found.gid})" if found else "none"


# fmt: off
#: What reads it is cli.py's.
CONFIG = Option("config", TEXT, "TOML file with options, read again at each reload.\n"
                "LISTEN and COMMAND may stand there, too. What the command line says overrides it. "
                "See docs/reference.md.",
                metavar="FILE", no_key=_LINE_ONLY, is_eager=True, expose_value=False)
GROUPS: Mapping[str, Sequence[Option]] = {
    "This instance": (
        CONFIG,
        Option("name", TEXT, "Name of this instance.\n"
               "It is in status, log, syslog, ps and metrics, and socketprotectorctl --name finds "
               "by it.", "name", STAYS, metavar="NAME", unset="the command's"),
        Option("pid-file", TEXT, "Write the protector's process ID to this file.\n"
               "The file is locked as long as the protector lives: a second one is refused, "
               "a stale file replaced.", "pid_file", STAYS, metavar="FILE"),
        Option("foreground", FLAG, "Do not detach.", "foreground", STAYS, short="f"),
        Option("guard", FLAG, "Run under a small parent that restarts a protector that dies.\n"
               "The parent holds the descriptors meanwhile: nothing is closed.", "guarded", STAYS),
        Option("check", FLAG, "Say whether it would start, and start nothing.\n"
               "Where the pid file is held: whether it would after the end of that one.",
               no_key=_LINE_ONLY),
        Option("control", TEXT, "Path of the control socket.", at_reload=STAYS, metavar="PATH",
               unset="NAME.control in $XDG_RUNTIME_DIR/socketprotector or /run/socketprotector"),
        Option("no-control", FLAG, "Have no control socket.", at_reload=STAYS),
        Option("control-group", TEXT, "Let members of this group use the control socket.",
               "control_group", STAYS, metavar="GROUP"),
        Option("status-group", TEXT, "Let members of this group ask it for status and events.\n"
               "They can change nothing: for monitoring, as by socketprotector-exporter.",
               "status_group", STAYS, metavar="GROUP"),
        Option("watch", TEXT, "Reload when files below this path change. Repeatable.\n"
               "For development: docs/start.md.", metavar="PATH", multiple=True, no_key=_LINE_ONLY),
        Option("version", FLAG, "Show the version and exit.", no_key=_LINE_ONLY,
               **_says(lambda ctx: f"SocketProtector, version {__version__}")),
        Option("help", FLAG, "Show this message and exit.", no_key=_LINE_ONLY, short="h?",
               **_says(click.Context.get_help)),
    ),
    "Workers": (
        Option("handoff", click.Choice(list(MODES)),
               "How connections reach a worker; see docs/modes.md.\n"
               "connection: the worker takes them from a queue. listener: the worker accepts them, "
               "from an inherited socket (unmodified servers). stdio: each is stdin and stdout of "
               "a program of its own. legacy: as under the C++ SocketProtector.",
               "handoff", STAYS, default="connection"),
        Option("shell", FLAG, "With --handoff stdio: run COMMAND by /bin/sh -c.", "shell"),
        Option("workers", click.IntRange(1, _MANY),
               "Worker processes; with --handoff stdio programs that run at once.\n"
               "What signals TTIN and TTOU made of it stays until the file says another number.",
               "workers", unset="1; 4 with --handoff stdio"),
        Option("ready", READY, "How a worker shows that it is ready.\n"
               "notify: it sends READY=1. ack: it sends einhorn's ACK. fd:N: it writes a line to "
               "descriptor N. accept: it accepts a connection. http:/PATH, https:/PATH: it "
               "answers 200 to 399. check:CMD: the command succeeds. after:TIME: it has lived "
               "for TIME. See docs/probes.md.",
               unset="notify; with --handoff listener the first of notify, ack, fd and accept"),
        Option("start-timeout", TIME_ABOVE_0, "Time allowed to become ready.",
               "policy.start_timeout_s", default="60s"),
        Option("start-tries", click.IntRange(1, _MANY),
               "Attempts at the first start, if the worker exits before it is ready.",
               "policy.start_tries", "changes; it counts at the first start alone", default=3),
        Option("watchdog", TIME,
               "Replace a worker that sent WATCHDOG=1 and then nothing for this time; 0: never.\n"
               "The client library sends it from the loop that serves.",
               "watchdog_s", default="0"),
        Option("health", HEALTH, "Probe the serving workers, and report the result.\n"
               "http:/PATH, https:/PATH, accept and check:CMD are as with --ready. The result is "
               "in status, metrics, log and the exporter's /readyz. It never restarts or rolls "
               "back anything. See docs/probes.md.", unset="no probe"),
        Option("health-every", TIME_EACH, "Time from one health probe to the next; 100ms or more.",
               "health_every_s", default="5s"),
        Option("health-failures", click.IntRange(1, _MANY),
               "Bad answers in a row that make the workers unhealthy.",
               "health_failures", default=3),
        Option("health-timeout", TIME_TO_ANSWER, "Time allowed for an answer; 10ms or more.",
               "health_timeout_s", default="2s"),
        Option("retire-after", SHARE,
               "Replace a worker after N connections, varied by up to J; 0: never.\n"
               "As for the next two, its replacement starts first.\n"
               "For workers on the client library, which count.",
               default="0"),
        Option("max-memory", SIZE, "Replace a worker above this memory size: 500M, 2G; 0: never.",
               "worker_limits.memory_bytes", default="0"),
        Option("max-age", TIME, "Replace a worker of this age; 0: never.",
               "worker_limits.age_s", default="0"),
    ),
    "Reload and stop": (
        Option("reload-order", click.Choice(["start-first", "stop-first"]),
               "Start the new workers before the old ones stop, or after.\n"
               "stop-first is for a daemon that holds something exclusive; clients wait meanwhile.",
               "policy.stop_first", default="start-first",
               show=lambda first: "stop-first" if first else "start-first"),
        Option("settle", TIME, "Keep the old generation on standby this long after the switch.\n"
               "If the new one fails within this time, the old one serves again.",
               "policy.settle_s", default="0"),
        Option("settle-check", SETTLE_CHECK,
               "Probe the new generation meanwhile; after a bad answer the old one serves again.\n"
               "check:CMD, or CMD alone, runs every second. It gets the counts of both generations "
               "as JSON on stdin; its exit status is the answer. http:/PATH, https:/PATH are as "
               "with --ready. See docs/probes.md.", unset="no probe"),
        Option("drain-signal", SIGNAL,
               "With --handoff listener: the signal that tells a worker to finish.\n"
               "A worker on the client library gets the end of its line instead.",
               "drain_signal", default="TERM"),
        Option("drain-timeout", TIME,
               "Time an old generation has to finish its connections, then TERM; 0: no limit.",
               "policy.drain_timeout_s", default="0"),
        Option("max-draining", click.IntRange(0, _MANY),
               "Old generations that may drain at a time; above it the oldest ends; 0: no limit.",
               "policy.max_draining", default=0),
        Option("lame-duck", TIME,
               "Time to serve on after a stop was requested, while /readyz says 503; 0: none.\n"
               "So load balancers send clients elsewhere before the first one would be refused. "
               "A second TERM ends it; INT stops at once. See docs/load-balancers.md.",
               "policy.lame_duck_s", default="0"),
        Option("lame-duck-idle", TIME,
               "End --lame-duck earlier, when no client has come for this time; 0: never.\n"
               "A balancer that looks seldom may still send one after that.",
               "policy.lame_duck_idle_s", default="0"),
        Option("stop-timeout", TIME, "Time allowed for a graceful stop, then TERM.",
               "policy.stop_timeout_s", default="30s"),
        Option("kill-timeout", TIME, "Time from TERM to KILL.",
               "policy.kill_timeout_s", default="5s"),
    ),
    "Connections": (
        Option("backlog", click.IntRange(1, _MANY),
               "Connections that may wait in the kernel, for each listener.",
               at_reload="holds for listeners that are added", default=4096),
        Option("queue", click.IntRange(wire.SMALLEST_QUEUE, _MANY),
               "Connections sent to the workers that none has taken yet, at most.",
               "queue", default=256),
        Option("busy-poll", TIME,
               "Wait awake this long for the next of a row of connections; 0: sleep at once.\n"
               "Only while they come one by one, each sooner than that. It takes 30 % from the "
               "latency for one processor's time, and is used only where there is more than one.",
               "busy_poll_s", STAYS, default="200us"),
    ),
    "Users and privileges": (
        Option("user", TEXT, "Run as this user once the sockets are bound; needs root.",
               "identity", STAYS, metavar="USER", show=_user),
        Option("group", TEXT, "Group to run as.",
               at_reload=STAYS, metavar="GROUP", unset="the user's"),
        Option("worker-user", TEXT, "Run the workers as this user instead; needs --user.\n"
               "The protector keeps CAP_SETUID, CAP_SETGID and CAP_KILL; only then is it isolated "
               "from them.", "worker_identity", STAYS, metavar="USER", show=_user),
        Option("require-user", FLAG, "Refuse to be root unless --user says so.\n"
               "For units and scripts.", no_key=_LINE_ONLY),
        Option("no-new-privs", FLAG,
               "Let no set-user-ID program gain privileges, here and in the workers.",
               "no_new_privileges", STAYS),
    ),
    "Environment of the workers": (
        Option("chdir", TEXT, "Directory where workers start.\n"
               "A symbolic link in it is followed at each reload.",
               "directory", metavar="DIR", unset="the caller's"),
        Option("umask", OCTAL, "umask of the workers.", "umask", unset="the caller's"),
        Option("limit", PAIR, "Resource limit: nofile, core or nice. Repeatable.",
               metavar="NAME=N", multiple=True, unset="the caller's"),
        Option("env", PAIR, "Environment variable. Repeatable.\n"
               "ps shows arguments: put secrets into a file.", multiple=True),
        Option("env-file", TEXT, "File of NAME=VALUE lines, read again at each reload.",
               "env_file", "changes, and is read again", metavar="FILE"),
        Option("clear-env", FLAG, "Pass on none of the caller's environment; PATH is systemd's."),
        Option("keep-env", NAMES, "Pass on only these variables of the caller's environment.\n"
               "See docs/security.md.", "keep_env", unset="all",
               show=lambda names: "all" if names is None else NAMES.show(names)),
    ),
    "Log": (
        Option("log-file", TEXT, "Log file of the protector and the workers.\n"
               "Where no syslog daemon listens at /dev/log, lines are lost until one does; the "
               "start says so.",
               "log_file", STAYS, metavar="FILE", unset="syslog, or the terminal with -f"),
        Option("log-level", click.Choice(list(LEVELS)), "Lowest level that is logged.",
               "log_level", default="info"),
        Option("verbose", FLAG, "Log every decision: --log-level debug.",
               short="v", no_key='write log-level = "debug"'),
        Option("log-format", click.Choice(FORMATS), "Format of each line.\n"
               "text: key=value, in colour on a terminal unless NO_COLOR is set. json: one object "
               "a line.", "log_format", STAYS, default="text"),
        Option("log-prefix", FLAG, "Begin each line of a worker with [GENERATION PID].\n"
               "Also with -f on a terminal or a file, it keeps a failed worker's last words "
               "(docs/log.md).",
               "log_prefix", STAYS),
        Option("no-log-relay", FLAG, "Let workers write to the log themselves.\n"
               "This saves 10.5 MB. After a rotation running workers keep the old file, and a "
               "failed worker's last words are not known (docs/log.md).",
               "log_relay", STAYS, show=lambda relay: "false" if relay else "true"),
    ),
}
# fmt: on
OPTIONS = tuple(option for group in GROUPS.values() for option in group)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first `--`, which click would drop."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]
