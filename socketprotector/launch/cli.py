"""The command line: options in, checked and resolved settings out; then launch.

Whatever is wrong is one line: what, where, what to do.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .. import __version__
from ..model import handoff, known_servers
from ..model.duration import Duration
from ..model.errors import Refusal, UsageError
from ..model.frozen import frozen
from ..model.log_format import FORMATS, LEVELS
from ..model.policy import Policy
from ..model.settings import Limits, ListenerSettings, Origin, Settings
from ..system import inherited
from ..system.channel import SMALLEST_QUEUE
from ..system.cpu_quota import scheduler
from ..system.terminal import STDERR, STDOUT, tell
from . import activation, notify_dir, options, preflight, stored_listeners
from .bind_control import default_path
from .bind_tcp import Bound, bind_all, not_bound, pair
from .listen_spec import Listen, parse
from .options import Ready
from .start import launch

if TYPE_CHECKING:
    from .config_file import ConfigFile

_DURATION = Duration()
_ABOVE_ZERO = Duration(zero=False)
#: More is a mistake, and would not fit the system calls.
_MANY = 1_000_000
#: Of a program's name as that of its service: what a line of syslog has room for (RFC 5424).
_NAME_CHARS = 48
_FILE = "socketprotector.launch.config_file"
#: What counts as ready where nobody says.
_READY = {handoff.LISTENER: Ready("any", after_s=1.0)}
#: What asks a resident process for something: kept until there is one.
_FOR_LATER = (
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


@frozen
class Asked:
    """What the command line and the file ask for, checked; nothing is bound yet."""

    settings: Settings
    listens: list[Listen]
    backlog: int
    check: bool
    config: str | None
    control: str | None  # where its socket is to be; None: where it usually is; "": nowhere


@frozen
class _Purpose:
    """Why the command line is read, and what to do with it."""

    words: tuple[str, ...]
    command: list[str]
    running: Settings | None  # of a protector that reads it again
    act: Callable[[Asked], int]

    @property
    def directory(self) -> str:
        """What relative paths on the command line are meant against."""
        return self.running.origin.directory if self.running else preflight.here()


def _read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Have the file's values in the place of the defaults."""
    if value is not None:
        from .config_file import ConfigFile  # with tomllib: only for those who have one

        file = ConfigFile(os.path.join(ctx.obj.directory, value))
        file.convert(ctx)
        ctx.default_map = file.values
        ctx.meta[_FILE] = file


@click.command(
    context_settings={"help_option_names": ["-h", "-?", "--help"], "show_default": True},
    options_metavar="[OPTIONS]",
    epilog=known_servers.table(),
)
@click.argument("listen", nargs=-1, metavar="LISTEN... -- COMMAND [ARG...]")
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML with these options, read again at each reload; the command line wins.",
)
@click.option("--pid-file", metavar="FILE", help="Write the protector's pid there.")
@click.option("-f", "--foreground", is_flag=True, help="Do not detach.")
@click.option("--guard", is_flag=True, help="Keep a tiny parent that survives the protector.")
@click.option("-v", "--verbose", is_flag=True, help="Log every decision (--log-level debug).")
@click.option("--name", help="Name of this instance.  [default: the command's]")
@click.option("--check", is_flag=True, help="Say whether it would start; start nothing.")
@click.option(
    "--handoff",
    default=handoff.CONNECTION,
    type=click.Choice(handoff.MODES),
    help="What a worker gets; see docs/handoff.md.",
)
@click.option("--shell", is_flag=True, help="With --handoff stdio: COMMAND is for /bin/sh.")
@click.option(
    "--workers",
    type=click.IntRange(1, _MANY),
    help="Processes at once.  [default: 1; 4 with --handoff stdio]",
)
@click.option(
    "--reload-order",
    default="start-first",
    type=click.Choice(["start-first", "stop-first"]),
    help="stop-first: for a daemon that holds something exclusive.",
)
@click.option(
    "--ready",
    callback=options.ready,
    metavar="notify|ack|fd:N|check:CMD|after:TIME",
    help="When a worker is ready: it said READY=1, sent einhorn's ACK, wrote a line, CMD says so, "
    "or it lived so long.  [default: notify; with --handoff listener what comes first, or 1 s]",
)
@click.option(
    "--drain-signal",
    callback=options.signal_number,
    metavar="SIGNAL",
    help="With --handoff listener: tells a worker to finish.  [default: TERM]",
)
@click.option("--settle", default="0", type=_DURATION, help="Can still switch back for so long.")
@click.option("--start-timeout", default="60s", type=_ABOVE_ZERO, help="For READY.")
@click.option("--start-tries", default=3, type=click.IntRange(1), help="Of the first start.")
@click.option("--drain-timeout", default="0", type=_DURATION, help="Then TERM; 0: never.")
@click.option(
    "--max-draining", default=0, type=click.IntRange(0), help="Old generations; 0: no limit."
)
@click.option("--stop-timeout", default="30s", type=_DURATION, help="Of a graceful stop.")
@click.option("--kill-timeout", default="5s", type=_DURATION, help="From TERM to KILL.")
@click.option(
    "--backlog", default=4096, type=click.IntRange(1, _MANY), help="Waiting in the kernel."
)
@click.option(
    "--queue",
    default=256,
    type=click.IntRange(SMALLEST_QUEUE, _MANY),
    help="Sent to the workers and not yet taken.",
)
@click.option(
    "--busy-poll",
    default="200us",
    type=_DURATION,
    help="Await the next one awake for so long, while they come one by one; 0: sleep at once.",
)
@click.option(
    "--watchdog",
    default="0",
    type=_DURATION,
    help="Replace a worker that has said WATCHDOG=1 and is silent for so long.",
)
@click.option(
    "--max-requests",
    callback=options.share,
    metavar="N[+-J]",
    help="Replace a worker after N connections, some J more or fewer.",
)
@click.option(
    "--max-memory", callback=options.size, metavar="SIZE", help="And above so much: 500M, 2G."
)
@click.option("--max-age", default="0", type=_DURATION, help="And when it has served so long.")
@click.option("--control", metavar="PATH", help="Where the control socket is to be.")
@click.option("--no-control", is_flag=True, help="None.")
@click.option("--control-group", metavar="GROUP", help="Whose members may use it too.")
@click.option("--user", help="Run as this user once the sockets are bound.")
@click.option("--group", help="And as this group.")
@click.option("--require-user", is_flag=True, help="Refuse to be root unless --user says so.")
@click.option("--worker-user", help="Start workers as this user instead; needs --user.")
@click.option("--no-new-privs", is_flag=True, help="No set-user-id program gains anything.")
@click.option("--chdir", metavar="DIR", help="Where workers start; looked up at each reload.")
@click.option("--umask", callback=options.octal, metavar="OCTAL", help="Of the workers.")
@click.option(
    "--limit",
    multiple=True,
    callback=options.pairs,
    metavar="NAME=N",
    help="Of the workers: nofile, core, nice.  Again for more.",
)
@click.option(
    "--env",
    multiple=True,
    callback=options.pairs,
    metavar="NAME=VALUE",
    help="For the workers.  Again for more.",
)
@click.option("--env-file", metavar="FILE", help="NAME=VALUE lines, read again at each reload.")
@click.option("--clear-env", is_flag=True, help="Workers get none of the caller's environment.")
@click.option(
    "--keep-env",
    callback=options.names,
    metavar="NAME,...",
    help="Of the caller's environment workers get these alone.",
)
@click.option("--log-file", metavar="FILE", help="For the protector and the workers.")
@click.option("--log-level", default="info", type=click.Choice(list(LEVELS)))
@click.option("--log-format", default="text", type=click.Choice(FORMATS), help="Of each line.")
@click.option("--log-prefix", is_flag=True, help="Workers' lines say who wrote them.")
@click.option(
    "--no-log-relay",
    is_flag=True,
    help="Workers write to the log file or syslog's pipe themselves.",
)
@click.option("--watch", multiple=True, metavar="PATH", help="Reload when files change there.")
@click.version_option(__version__, prog_name="SocketProtector")
@click.pass_context
def _command(ctx: click.Context, /, **given: Any) -> int:
    """Own the listening sockets of a daemon, so that it can be restarted, upgraded or crash
    and nobody who connects notices.

    LISTEN is PORT, HOST:PORT, [HOST6]:PORT, unix:PATH, unix:@NAME or fd:NAME, with options as in
    4321?backlog=100&defer_accept=5 or unix:/run/x.sock?mode=0660&user=www&group=www.

    Signals: HUP reload; TERM, QUIT stop; INT stop at once; USR1 reopen the log file;
    TTIN, TTOU one worker more, fewer.
    """
    purpose: _Purpose = ctx.obj
    file: ConfigFile | None = ctx.meta.get(_FILE)
    return purpose.act(_Reading(ctx, purpose, file, given).asked())


class _Reading:
    """One look at all that was given: what comes from a file is told with its place there."""

    def __init__(
        self, ctx: click.Context, purpose: _Purpose, file: ConfigFile | None, given: dict[str, Any]
    ) -> None:
        self._ctx = ctx
        self._purpose = purpose
        self._file = file
        self._given = given
        self._directory = purpose.directory

    def asked(self) -> Asked:
        """Return it.  Raises Refusal."""
        given, file = self._given, self._file
        if file is None:
            self._refuse_what_is_missing()
        listens = [_fitting(each, given["handoff"]) for each in self._listens()]
        settings = self._settings(self._command())
        with self._about("env_file"):
            preflight.env_file_readable(settings.env_file)
        if settings.command:
            with self._about_file(not self._purpose.command, "command"):
                preflight.command(settings)
        with self._about("handoff"):
            preflight.mode(settings, self._said(), listens)
        with self._about("workers"):
            preflight.workers(settings)
        if file is not None:
            file.refuse_if_mistaken()
            self._refuse_what_is_missing()
        config = file.path if file else None
        control = "" if given["no_control"] else self._path("control")
        return Asked(settings, listens, given["backlog"], given["check"], config, control)

    def _refuse_what_is_missing(self) -> None:
        file = self._file
        if not (self._given["listen"] or (file and file.listens)):
            hint = f", or listen in {file.path}" if file else ""
            raise UsageError(f"no LISTEN; write e.g. SocketProtector 4321 -- ./daemon 4321{hint}")
        if not (self._purpose.command or (file and file.command)):
            hint = f", or command in {file.path}" if file else ""
            raise UsageError(
                f"no command; put it behind --, e.g. SocketProtector 4321 -- ./daemon 4321{hint}"
            )
        if self._given["require_user"]:
            preflight.says_who(self._given["user"], file.path if file else None)

    # -- where it comes from ---------------------------------------------------

    def _from_file(self, name: str) -> bool:
        source = self._ctx.get_parameter_source(name)
        return self._file is not None and source is ParameterSource.DEFAULT_MAP

    def _said(self) -> list[str]:
        """The options that were given, as they are written."""
        return [
            name.replace("_", "-")
            for name in self._given
            if self._ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        ]

    def _about(self, name: str) -> AbstractContextManager[None]:
        return self._about_file(self._from_file(name), name.replace("_", "-"))

    def _about_file(self, there: bool, *where: str | int) -> AbstractContextManager[None]:
        return self._file.about(*where) if self._file is not None and there else nullcontext()

    def _path(self, name: str) -> str | None:
        """A path, taken against the caller's directory or the file's."""
        value: str | None = self._given[name]
        folder = self._file.folder if self._file and self._from_file(name) else self._directory
        return os.path.join(folder, value) if value else None

    # -- the parts -------------------------------------------------------------

    def _listens(self) -> list[Listen]:
        if self._given["listen"] or self._file is None:
            return [parse(text, self._directory) for text in self._given["listen"]]
        found = []
        for index, text in enumerate(self._file.listens):
            with self._file.about("listen", index):
                found.append(parse(text, self._file.folder))
        return found

    def _command(self) -> tuple[str, ...]:
        """Take a relative command against the caller's directory, or the file's."""
        words, folder = tuple(self._purpose.command), self._directory
        if not words and self._file is not None:
            words, folder = self._file.command, self._file.folder
        name = words[0] if words else ""
        return (os.path.join(folder, name) if "/" in name else name, *words[1:]) if words else ()

    def _table(self, name: str) -> dict[str, str]:
        """What is given by name; the command line wins."""
        own: dict[str, str] = self._given[name]
        return {**(self._file.tables.get(name, {}) if self._file else {}), **own}

    def _limits(self) -> tuple[dict[str, int], int]:
        found: dict[str, int] = {}
        nice = 0
        for name, value in self._table("limit").items():
            with self._about_file(name not in self._given["limit"], "limit", name):
                more, least = options.limits({name: value})
                found.update(more)
                nice = least or nice
        return found, nice

    def _settings(self, command: tuple[str, ...]) -> Settings:
        """Check the options and resolve their paths."""
        given, purpose, running = self._given, self._purpose, self._purpose.running
        limits, nice = self._limits()
        directory = self._path("chdir") or self._directory
        with self._about("chdir"):
            if not os.path.isdir(directory):
                raise UsageError(f"--chdir {given['chdir']}: no such directory")
        identity = worker_identity = None
        with self._about("user" if self._from_file("user") else "group"):
            identity = preflight.identity(given["user"], given["group"], again=running is not None)
        with self._about("worker_user"):
            worker_identity = preflight.worker_identity(given["worker_user"], given["user"])
        umask = running.origin.umask if running else os.umask(0o022)
        if running is None:
            os.umask(umask)
        called = os.path.basename("sh" if given["shell"] else [*command, ""][0])[:_NAME_CHARS]
        name = given["name"] or (running.name if running else called)
        verbose = given["verbose"]
        mode = given["handoff"]
        ready = given["ready"] or _READY.get(mode, Ready("notify"))
        return Settings(
            name=name,
            command=command,
            directory=directory,
            policy=Policy(
                start_tries=given["start_tries"],
                start_timeout_s=given["start_timeout"],
                settle_s=given["settle"],
                drain_timeout_s=given["drain_timeout"],
                max_draining=given["max_draining"],
                stop_timeout_s=given["stop_timeout"],
                kill_timeout_s=given["kill_timeout"],
                stop_first=given["reload_order"] == "stop-first",
                workers_accept=mode == handoff.LISTENER,
                ready=mode if (mode, ready.kind) == (handoff.LEGACY, "notify") else ready.kind,
            ),
            handoff=mode,
            shell=given["shell"],
            pools=os.cpu_count() or 1,
            drain_signal=given["drain_signal"] or signal.SIGTERM,
            workers=given["workers"] or (handoff.PLACES if mode == handoff.STDIO else 1),
            ready=ready.kind,
            ready_after_s=ready.after_s,
            ready_fd=ready.fd,
            ready_check=ready.check,
            queue=given["queue"],
            busy_poll_s=given["busy_poll"],
            identity=identity,
            worker_identity=worker_identity,
            no_new_privileges=given["no_new_privs"],
            umask=umask if given["umask"] is None else given["umask"],
            nofile_soft=options.nofile_of_workers(os.environ),
            limits=tuple(limits.items()),
            nice=nice,
            batch=scheduler() == os.SCHED_BATCH,
            environment=tuple(self._table("env").items()),
            env_file=self._path("env_file"),
            keep_env=() if given["clear_env"] and not given["keep_env"] else given["keep_env"],
            pid_file=self._path("pid_file"),
            log_file=self._path("log_file"),
            log_level="debug" if verbose else given["log_level"],
            log_format=given["log_format"],
            log_relay=not given["no_log_relay"],
            log_prefix=given["log_prefix"],
            watch=preflight.watch(given["watch"], self._directory),
            foreground=given["foreground"],
            guarded=given["guard"],
            outlives_terminal=signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
            watchdog_s=given["watchdog"],
            worker_limits=Limits(
                requests=given["max_requests"][0],
                requests_spread=given["max_requests"][1],
                memory_bytes=given["max_memory"],
                age_s=given["max_age"],
            ),
            control_group=preflight.group(given["control_group"]),
            secret=os.urandom(12).hex(),
            origin=Origin(purpose.words, self._directory, umask, self._file is not None),
        )


def _fitting(listen: Listen, mode: str) -> Listen:
    """Where a worker gets the socket itself, every address of a port is one socket, not two.

    Raises UsageError for what each connection would have to be given by us: there we accept none.
    """
    if mode != handoff.LISTENER:
        return listen
    if "priority" in listen.options:
        raise UsageError(
            f"{listen.text}: priority cannot be had with --handoff listener: connections inherit "
            "none; let the server set it"
        )
    if listen.host or listen.path or listen.passed:
        return listen
    return replace(listen, options={"v6only": "0", **listen.options})


def _launch(asked: Asked) -> int:
    """Bind and go on to a resident process; or only say whether that could be done."""
    settings = asked.settings
    preflight.kernel()
    preflight.pid_file(settings.pid_file, check=asked.check)
    preflight.log_file(settings.log_file)
    notices: list[str] = []
    given = activation.passed()
    passed = activation.take(asked.listens, given.given)
    taken = {}
    if not asked.check:
        taken = stored_listeners.take(
            asked.listens, passed, given.left, asked.backlog, notices.append
        )
    bound = bind_all(
        asked.listens,
        asked.backlog,
        notice=notices.append,
        passed=passed,
        left=taken,
        dry=asked.check,
    )
    second: dict[int, Bound] = {}
    try:
        listeners = [each.settings for each in bound]
        if asked.check:
            listeners = _would_be(asked.listens, passed)
        settings = settings.listening(tuple(listeners))
        preflight.names(settings)
        addresses = [each.address for each in settings.listeners]
        if asked.control != "":
            path = asked.control or default_path(settings.name)
            settings = replace(settings, control=ListenerSettings(f"unix:{path}"))
        notices += preflight.syslog(settings)
        notices += preflight.notices(settings, asked.listens, asked.backlog)
        if settings.policy.workers_accept:
            second = pair(bound, notices.append)
        if asked.check:
            notify_dir.check(settings, notices.append)
        here = asked.check or not (settings.foreground and settings.log_file is None)
        if here:
            for notice in notices:  # else its log says them, in the same place
                tell(notice)
        terminal = os.isatty(STDERR)
        if here or terminal:
            for lack in preflight.server(settings, asked.listens, typed=True):
                tell(lack)
        if here or not terminal:
            notices += preflight.server(settings, asked.listens, typed=False)
        if asked.check:
            valid = f"{asked.config} is valid; " if asked.config else ""
            listens = " ".join(listen.text for listen in asked.listens)
            print(f"SocketProtector: {valid}would start {' '.join(settings.command)} on {listens}")
            return 0
        if any(
            listen.path is None and listen.passed is None and not listen.port
            for listen in asked.listens
        ):
            tell(f"listening on {' '.join(addresses)}", STDOUT)
        # Nothing secret may stand there: of the options only the name is shown.
        label = [settings.name, *addresses, "--", settings.executed[0]]
        places = {f"{inherited.LISTENER}{index}": each for index, each in enumerate(bound)}
        places |= {f"{inherited.TWIN}{index}": each for index, each in second.items()}
        stored_listeners.store(given, places)
        return launch(settings.noticed(notices), places, label, settings.origin.directory)
    except BaseException:
        for each in (*bound, *second.values()):
            each.discard()
        raise


def _would_be(
    listens: Sequence[Listen], passed: Mapping[int, Sequence[Bound]]
) -> list[ListenerSettings]:
    """Return what a start would bind: bind_all() has seen that it can, and told its notices."""
    found: list[ListenerSettings] = []
    for index, listen in enumerate(listens):
        if index in passed:
            found += (replace(each.settings, **listen.told) for each in passed[index])
        else:
            found += not_bound(listen, lambda text: None)
    return found


def ask(
    arguments: Sequence[str], act: Callable[[Asked], int], running: Settings | None = None
) -> int:
    """Read a command line, and the file it names; return what `act` makes of it.

    running: of the protector that was started with it and reads it again.  Raises Refusal,
    and click's Exit where help is asked for.
    """
    words, command = options.split(arguments)
    purpose = _Purpose(tuple(arguments), command, running, act)
    try:
        status = _command.main(
            words, prog_name="SocketProtector", standalone_mode=False, obj=purpose
        )
    except click.ClickException as error:
        message = error.format_message().rstrip(".").replace("\n", " ")
        raise UsageError(f"{message}; see --help") from error
    return int(status or 0)


def main(arguments: Sequence[str]) -> int:
    """Parse, check and launch.  Returns the exit status."""
    _stand_on_three_descriptors()
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_LATER)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up and go
    try:
        try:
            return ask(arguments, _launch)
        except click.exceptions.Exit as error:
            return error.exit_code
        except Refusal as error:
            tell(str(error))
            return error.status
    except (click.Abort, KeyboardInterrupt):  # also while a refusal is said
        return 130


def _stand_on_three_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: no socket may come to that place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            # ruff: noqa: SIM115 -- it stays open for the life of the process
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))
