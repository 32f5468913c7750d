"""The table of all options.

The command line, help, completion, the keys of the configuration file and the comparison at a
reload are made from this table.  tools/reference.py makes the option tables of the manual page and
of docs/reference.md from it.

A new option needs a row here and a field of Settings.  If the option's value differs from the
field's, resolve.py converts it.
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
from ..model.reload_orders import ORDERS
from ..model.settings import Identity
from .option_values import (
    CANARY,
    FLAG,
    HEALTH,
    NAMES,
    NOT_EMPTY,
    OCTAL,
    PAIR,
    READY,
    SETTLE_CHECK,
    SHARE,
    SIGNAL,
    SIZE,
    SURGE,
    TEXT,
    TIME,
    TIME_ABOVE_0,
    TIME_EACH,
    TIME_TO_ANSWER,
)

#: What a reload does with a changed value in the file; some options have a sentence instead.
CHANGES, STAYS = "changes", "stays"
#: Long options that the C++ SocketProtector took with one dash.
_ONE_DASH = ("pid-file", "foreground", "verbose")
_LINE_ONLY = "for the command line only"
#: A larger number is a mistake, and too large for system calls.
_MANY = 1_000_000
#: Metavar -> this system's names for such a value, for completion.
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
    """One option: its row of the help, of the documents and of the configuration file."""

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
        common: bool = False,
        metavar: str = "",
        placeholder: str = "",
        show: Callable[[Any], str] | None = None,
        **more: Any,
    ) -> None:
        """key: the name without dashes, also in a file.
        kind: how a value is read.
        text: the first line is for --help, all lines for the manual and the reference.
        field: the field of Settings that the option sets, such as "policy.settle_s".
        at_reload: what a reload does with a changed value.
        unset: the default, in words.
        no_key: why a file cannot have this option.
        common: whether --help shows it; --help-all shows every option.
        metavar: the possible values, if kind does not describe them.
        placeholder: a shorter metavar, for the help only.
        show: formats a value of the field for people.
        more: click's own arguments.
        """
        self.key = key
        self.kind = kind
        self.text = text
        self.field = field
        self.at_reload = at_reload
        self.unset = unset
        self.no_key = no_key
        self.common = common
        self._show = show
        self.default_words = unset or str(more.get("default", ""))
        if kind is FLAG:
            more["is_flag"] = True
            self.values = ""
        else:
            self.values = metavar or _values(kind)
            more |= {"type": kind, "metavar": placeholder or self.values}
        names = [*(f"-{each}" for each in short), f"--{key}"]
        super().__init__(names, help=text.partition("\n")[0], **more)

    def help_row(self) -> tuple[str, str]:
        """Return the names with a placeholder, and the text's first line with the default."""
        names = ", ".join(sorted(self.opts, key=len))
        default = f"  [default: {self.default_words}]" if self.default_words else ""
        return f"{names} {self.metavar or ''}".rstrip(), f"{self.help}{default}"

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        if self.key in _ONE_DASH:
            flag = {"action": "store_const", "const": True} if self.kind is FLAG else {}
            parser.add_option(self, [f"-{self.key}"], self.name, **flag)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Return the values that may follow this option."""
        from click.shell_completion import CompletionItem

        if self.values in ("FILE", "PATH", "DIR"):
            kind = "dir" if self.values == "DIR" else "file"
            return [CompletionItem(incomplete, type=kind)]
        named = _NAMED.get(self.values)
        words = named() if named else re.findall(r"(?<![\w-])[a-z][a-z-]*\b(?!:)", self.values)
        found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
        return found or super().shell_complete(ctx, incomplete)

    def shown(self, value: Any) -> str:
        """Format a value of the field for people."""
        if self._show is not None:
            return self._show(value)
        if value is None:
            return "none"
        text: str = getattr(self.kind, "show", str)(value)
        return text.lower() if self.kind is FLAG else text


def _values(kind: Any) -> str:
    """Return the possible values of a kind, for the documents and shells."""
    if isinstance(kind, click.Choice):
        return "|".join(map(str, kind.choices))
    if isinstance(kind, click.types.IntParamType):
        return "N"
    name: str = kind.name
    return name


def _shows(text: Callable[[Any], str]) -> Mapping[str, Any]:
    """Return the arguments for an option that prints a text and ends the command."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(text(ctx))
            ctx.exit()

    return {"is_eager": True, "expose_value": False, "callback": show}


def _user(found: Identity | None) -> str:
    return f"{found.user} (group {found.gid})" if found else "none"


# fmt: off
#: cli.py adds the callback that reads the file.
CONFIG = Option("config", NOT_EMPTY, "Read options from a TOML file, at each reload too.\n"
                "The file can also have LISTEN and COMMAND. The command line overrides the file. "
                "See docs/reference.md.",
                metavar="FILE", no_key=_LINE_ONLY, common=True, is_eager=True, expose_value=False)
GROUPS: Mapping[str, Sequence[Option]] = {
    "Listen": (
        Option("handoff", click.Choice(list(MODES)),
               "Choose how workers get connections: connection (client library), listener (the "
               "server accepts), stdio or legacy.\n"
               "stdio: each connection is stdin and stdout of its own program. legacy: for workers "
               "of the C++ SocketProtector. See docs/modes.md.",
               "handoff", STAYS, placeholder="MODE", common=True, default="connection"),
        Option("backlog", click.IntRange(1, _MANY),
               "Let this many connections wait in the kernel, for each listener.",
               at_reload="applies to added listeners", default=4096),
        Option("queue", click.IntRange(wire.SMALLEST_QUEUE, _MANY),
               "Let this many connections wait in the workers' queue (none with --handoff "
               "listener).",
               "queue", default=256),
        Option("busy-poll", TIME,
               "Poll this long for the next connection before sleeping; 0: sleep at once.\n"
               "SocketProtector polls only while connections come at intervals under TIME; never "
               "with one processor or --handoff listener. Polling lowers latency by 30 %, and "
               "uses one processor.",
               "busy_poll_s", STAYS, default="200us"),
    ),
    "Start": (
        Option("name", NOT_EMPTY, "Name this instance.\n"
               "The name is in status, log, syslog, ps and metrics. Pass it to "
               "socketprotectorctl --name.",
               "name", STAYS, metavar="NAME", common=True, unset="the command's"),
        Option("foreground", FLAG, "Do not detach; log to the terminal unless --log-file.",
               "foreground", STAYS, short="f", common=True),
        Option("guard", FLAG, "Restart SocketProtector if it dies; sockets stay open.\n"
               "A small parent process holds copies of the descriptors.",
               "guarded", STAYS, common=True),
        Option("pid-file", NOT_EMPTY, "Write the protector's process ID, or with --guard the "
               "guard's, to this file.\n"
               "While the protector runs, the file is locked: a second start is refused, "
               "and a stale file is replaced.", "pid_file", STAYS, metavar="FILE"),
        Option("ready", READY, "Choose what shows that a worker is ready: notify, ack, fd:N, "
               "accept, http:PATH, check:CMD or after:TIME.\n"
               "notify: the worker sends READY=1. ack: it sends einhorn's ACK. fd:N: it writes a "
               "line to descriptor N. accept: it accepts a connection. http:/PATH, https:/PATH: "
               "it answers 200 to 399. check:CMD: the command succeeds. after:TIME: the worker "
               "has run for TIME. See docs/probes.md.", placeholder="HOW", common=True,
               unset="notify; with --handoff listener the earliest of notify, ack, fd and accept"),
        Option("start-timeout", TIME_ABOVE_0, "Allow workers this long to become ready.",
               "policy.start_timeout_s", default="60s"),
        Option("start-tries", click.IntRange(1, _MANY),
               "Try the first start this many times, if a worker crashes before it is ready.",
               "policy.start_tries", "no effect: used only at the first start", default=3),
    ),
    "Reload": (
        Option("reload-order", click.Choice([each.name for each in ORDERS]),
               "Start new workers before or after the old ones stop, or replace a few at a time.\n"
               "stop-first is for a daemon that locks something; clients wait meanwhile. "
               "rolling needs less memory, and needs --drain-timeout. See docs/rollout.md.",
               default="start-first"),
        Option("surge", SURGE, "With --reload-order rolling: add this many workers at most.\n"
               "P%: this percentage of the workers, rounded up.", default="1"),
        Option("canary", CANARY,
               "Give each new generation only this share of new connections at first, such as 5%.\n"
               "SHARE is 0.01% to 99.99% of the connections, not of requests. All clients "
               "follow after --canary-for. See docs/rollout.md.", unset="all"),
        Option("canary-for", TIME_ABOVE_0, "Keep the canary at its share for this time.",
               default="60s"),
        Option("canary-at-least", click.IntRange(0, 1_000_000_000),
               "Require this many connections in the canary.\n"
               "With fewer the canary lasts twice as long. If it still has too few, the reload "
               "fails.", default=0),
        Option("settle", TIME, "Keep the old generation on standby this long after the switch.\n"
               "If the new generation fails within this time, the old one serves again. Not with "
               "--reload-order stop-first.",
               "policy.settle_s", default="0"),
        Option("releases", NOT_EMPTY, "Start a release, a subfolder of this folder.\n"
               "The release's path replaces {release} in COMMAND, checks, --chdir, --env and "
               "--env-file. socketprotectorctl deploy NAME starts another release. See "
               "docs/deploy.md.",
               "releases", STAYS, metavar="DIR", show=lambda path: path or "none"),
        Option("current", NOT_EMPTY, "Start the release to which this symbolic link leads.\n"
               "SocketProtector moves the link once a deploy has succeeded.",
               "current", STAYS, metavar="PATH", show=lambda path: path or "none"),
        Option("deployer", NOT_EMPTY, "Accept releases that belong to this user or root.",
               metavar="USER"),
        Option("watch", NOT_EMPTY, "Reload when files below this path change. Repeatable.\n"
               "For development: docs/start.md.", metavar="PATH", multiple=True, no_key=_LINE_ONLY),
    ),
    "Workers": (
        Option("workers", click.IntRange(1, _MANY), "Run this many workers.\n"
               "With --handoff stdio: run at most this many programs at a time. In other modes "
               "TTIN and TTOU change the number, until a reload reads a new N.",
               "workers", common=True, unset="1; 4 with stdio"),
        Option("shell", FLAG, "With --handoff stdio: run COMMAND by /bin/sh -c.", "shell"),
        Option("watchdog", TIME,
               "Replace a worker that stops sending WATCHDOG=1 for this time; 0: never.\n"
               "The client library sends WATCHDOG=1 from the serving loop.",
               "watchdog_s", default="0"),
        Option("retire-after", SHARE,
               "Replace a worker after N connections, varied by up to J; 0: never.\n"
               "The replacement starts first, also with --max-memory and --max-age. Only workers "
               "on the client library count connections.",
               default="0"),
        Option("max-memory", SIZE, "Replace a worker above this memory size: 500M, 2G; 0: never.",
               "worker_limits.memory_bytes", default="0"),
        Option("max-age", TIME, "Replace a worker of this age; 0: never.",
               "worker_limits.age_s", default="0"),
        Option("chdir", NOT_EMPTY, "Start workers in this directory.\n"
               "Each reload follows symbolic links in the path again.",
               "directory", metavar="DIR", unset="the caller's"),
        Option("umask", OCTAL, "Set the umask of the workers.", "umask", unset="the caller's"),
        Option("limit", PAIR, "Set nofile or core (soft limits), or nice. Repeatable.",
               metavar="NAME=N", multiple=True, unset="the caller's"),
        Option("env", PAIR, "Set an environment variable. Repeatable.\n"
               "Put secrets into --env-file.", multiple=True),
        Option("env-file", NOT_EMPTY, "Read NAME=VALUE lines from this file, again at each reload.",
               "env_file", metavar="FILE"),
        Option("clear-env", FLAG,
               "Pass on none of the caller's variables; PATH is systemd's default."),
        Option("keep-env", NAMES, "Pass on only these variables of the caller's environment.\n"
               "See docs/security.md.", "keep_env", unset="all",
               show=lambda names: "all" if names is None else NAMES.show(names)),
    ),
    "Checks": (
        Option("settle-check", SETTLE_CHECK,
               "Probe the new generation during --settle; after a bad answer the old one serves "
               "again.\n"
               "check:CMD, or CMD alone, runs every second. CMD gets the counts of both "
               "generations as JSON on stdin; its exit status is the answer. http:/PATH, "
               "https:/PATH are as with --ready. See docs/probes.md.", unset="no probe"),
        Option("health", HEALTH, "Probe the serving workers, and report the result.\n"
               "http:/PATH, https:/PATH and accept are as with --ready. check:CMD runs once per "
               "probe, not per worker. The result is in status, metrics, log and the exporter's "
               "/readyz. A bad result restarts nothing and rolls nothing back. See "
               "docs/probes.md.",
               unset="no probe"),
        Option("health-every", TIME_EACH, "Wait this long between health probes; 100ms or more.",
               "health_every_s", default="5s"),
        Option("health-failures", click.IntRange(1, _MANY),
               "Report unhealthy after this many bad answers without a good one.",
               "health_failures", default=3),
        Option("health-timeout", TIME_TO_ANSWER, "Wait this long for an answer; 10ms or more.",
               "health_timeout_s", default="2s"),
    ),
    "Drain": (
        Option("drain-timeout", TIME,
               "Give an old generation this long to finish, then send TERM; "
               "0: no limit (30s with stop-first).",
               "policy.drain_timeout_s", common=True, default="0"),
        Option("drain-spread", TIME,
               "Let old workers end their connections evenly over this time; 0: no spread.\n"
               "For workers on the Python client library. See docs/long-lived.md.",
               "policy.drain_spread_s", default="0"),
        Option("drain-signal", SIGNAL,
               "With --handoff listener: end workers gracefully by this signal.\n"
               "A worker on the client library gets end of file on its RETURN line instead.",
               "drain_signal", default="TERM"),
        Option("max-draining", click.IntRange(0, _MANY),
               "End the oldest draining generation if more than this many drain; 0: no limit.",
               "policy.max_draining", default=0),
        Option("stop-timeout", TIME, "Allow this long for a graceful stop, then send TERM.",
               "policy.stop_timeout_s", default="30s"),
        Option("stop-spread", TIME,
               "At a stop, end connections evenly over this time, as with --drain-spread.",
               "policy.stop_spread_s", default="0"),
        Option("kill-timeout", TIME, "Send KILL this long after TERM.",
               "policy.kill_timeout_s", default="5s"),
        Option("lame-duck", TIME,
               "Serve this long after a stop request, while the exporter's /readyz answers 503; "
               "0: none.\n"
               "Load balancers then send clients elsewhere, before any client is refused. "
               "A second TERM ends the lame duck. See docs/fleet.md.",
               "policy.lame_duck_s", default="0"),
        Option("lame-duck-idle", TIME,
               "End --lame-duck earlier, when no client has come for this time; 0: never.\n"
               "A load balancer that checks rarely may send clients after this early end.",
               "policy.lame_duck_idle_s", default="0"),
    ),
    "Log": (
        Option("log-file", NOT_EMPTY, "Write the log, and the workers' output, to this file.\n"
               "If the log goes to syslog and no daemon listens at /dev/log, lines are lost; the "
               "start warns.",
               "log_file", STAYS, metavar="FILE", common=True,
               unset="syslog, or the terminal with -f"),
        Option("log-level", click.Choice(list(LEVELS)), "Log this and more severe levels.",
               "log_level", default="info"),
        Option("verbose", FLAG, "Log every decision: --log-level debug.",
               short="v", no_key='write log-level = "debug"'),
        Option("log-format", click.Choice(FORMATS), "Write each line in this format.\n"
               "text: key=value, in colour on a terminal unless NO_COLOR is set. json: one object "
               "a line.", "log_format", STAYS, default="text"),
        Option("log-prefix", FLAG, "Begin each line of a worker with [GENERATION PID].\n"
               "This also saves failed workers' last words if -f logs to a terminal or to 2>FILE "
               "(docs/log.md).",
               "log_prefix", STAYS, common=True),
        Option("no-log-relay", FLAG, "Let workers write to the log themselves.\n"
               "This saves 10.5 MB of memory, unless the log is syslog. But running workers "
               "keep the old file after a rotation, and a failed worker's last words may be "
               "unknown (docs/log.md).",
               "log_relay", STAYS, show=lambda relay: "false" if relay else "true"),
    ),
    "Security": (
        Option("user", TEXT, "Run as this user after binding; needs root.",
               "identity", STAYS, metavar="USER", common=True, show=_user),
        Option("group", TEXT, "Run as this group.",
               at_reload=STAYS, metavar="GROUP", unset="the user's"),
        Option("worker-user", TEXT, "Run the workers as this user instead; needs --user.\n"
               "Only this option isolates the protector from its workers. The protector then "
               "keeps CAP_SETUID, CAP_SETGID and CAP_KILL.", "worker_identity", STAYS,
               metavar="USER", show=_user),
        Option("require-user", FLAG, "Refuse to run as root unless --user root is given.\n"
               "For units and scripts.", no_key=_LINE_ONLY),
        Option("no-new-privs", FLAG,
               "Let SocketProtector and workers gain no privileges by set-user-ID programs.",
               "no_new_privileges", STAYS),
        Option("control-group", TEXT, "Let members of this group use the control socket.",
               "control_group", STAYS, metavar="GROUP"),
        Option("status-group", TEXT, "Let members of this group read status and events.\n"
               "They can change nothing. For monitoring, such as socketprotector-exporter.",
               "status_group", STAYS, metavar="GROUP"),
    ),
    "Configuration": (
        CONFIG,
        Option("check", FLAG, "Check what a start needs, and start nothing.\n"
               "If a protector with the same pid file is running, check as if it had ended.",
               no_key=_LINE_ONLY, common=True),
        Option("control", NOT_EMPTY, "Put the control socket at this path.", at_reload=STAYS,
               metavar="PATH",
               unset="NAME.control in $XDG_RUNTIME_DIR/socketprotector or /run/socketprotector"),
        Option("no-control", FLAG, "Make no control socket.", at_reload=STAYS),
        Option("version", FLAG, "Show the version and exit.", no_key=_LINE_ONLY,
               **_shows(lambda ctx: f"SocketProtector, version {__version__}")),
        Option("help", FLAG, "Show the common options and exit.", no_key=_LINE_ONLY, short="h?",
               **_shows(lambda ctx: ctx.get_help())),
        Option("help-all", FLAG, "Show every option and exit.", no_key=_LINE_ONLY,
               **_shows(lambda ctx: ctx.command.full_help(ctx))),
    ),
}
# fmt: on
OPTIONS = tuple(option for group in GROUPS.values() for option in group)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first `--`, which click would drop."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]
