"""The command line: options in, checked and resolved settings out; then launch.

The only module that prints.  Whatever is wrong is one line: what, where, what to do.
"""

from __future__ import annotations

import grp
import os
import pwd
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from . import __version__, envfile, process
from .address import Bound, Listen, bind_all, parse
from .channel import SMALLEST_QUEUE
from .errors import AlreadyRunning, Refusal, SystemRefused, UsageError
from .fleet import Policy
from .launch import launch
from .log import LEVELS
from .pidfile import PidFile
from .settings import Identity, Settings

T = TypeVar("T")

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
#: The original program's long options, which began with one dash.
_SINGLE_DASH = ("-pid-file", "-foreground", "-verbose")
_SOMAXCONN = "/proc/sys/net/core/somaxconn"


class Duration(click.ParamType[float]):
    """`500ms`, `10s`, `2m`, `1h` or plain seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        unit = next((u for u in ("ms", "s", "m", "h") if text.endswith(u)), "")
        try:
            seconds = float(text.removesuffix(unit)) * _UNITS.get(unit, 1.0)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < 1e9:
            self.fail(f"{text!r} is no duration; write 500ms, 10s, 2m or seconds", param, ctx)
        return seconds


DURATION = Duration()


def _ready(ctx: click.Context, param: click.Parameter, value: str) -> float | None:
    """`notify` -> None, `after:DURATION` -> seconds."""
    if value == "notify":
        return None
    kind, _, time = value.partition(":")
    if kind != "after" or not time:
        raise click.BadParameter(f"{value!r}: write notify or after:1s", ctx, param)
    return DURATION.convert(time, param, ctx)


def _pairs(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    found = {}
    for each in value:
        name, separator, content = each.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{each!r} is not NAME=VALUE", ctx, param)
        found[name] = content
    return found


def _octal(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        number = int(value, 8) if value is not None else 0
    except ValueError:
        number = -1
    if not 0 <= number <= 0o777:
        raise click.BadParameter(f"{value!r} is not octal, like 022", ctx, param)
    return number if value is not None else None


@click.command(
    context_settings={"help_option_names": ["-h", "-?", "--help"]},
    options_metavar="[OPTIONS]",
)
@click.argument("listen", nargs=-1, metavar="LISTEN... -- COMMAND [ARG...]")
@click.option("--pid-file", metavar="FILE", help="Write the protector's pid there.")
@click.option("-f", "--foreground", is_flag=True, help="Do not detach.")
@click.option("-v", "--verbose", is_flag=True, help="Log every decision (--log-level debug).")
@click.option("--name", help="Name of this instance.  [default: the command's]")
@click.option("--check", is_flag=True, help="Say whether it would start; start nothing.")
@click.option("--workers", default=1, type=click.IntRange(1), help="Processes at once.")
@click.option(
    "--reload-order",
    default="start-first",
    type=click.Choice(["start-first", "stop-first"]),
    help="stop-first: for a daemon that holds something exclusive.",
)
@click.option(
    "--ready",
    default="notify",
    callback=_ready,
    metavar="notify|after:TIME",
    help="When a worker is ready: it said READY=1, or it lived so long.",
)
@click.option("--settle", default="0", type=DURATION, help="Can still switch back for so long.")
@click.option("--start-timeout", default="60s", type=DURATION, help="For READY.")
@click.option("--start-tries", default=3, type=click.IntRange(1), help="Of the first start.")
@click.option("--drain-timeout", default="0", type=DURATION, help="Then TERM; 0: never.")
@click.option(
    "--max-draining", default=0, type=click.IntRange(0), help="Old generations; 0: no limit."
)
@click.option("--stop-timeout", default="30s", type=DURATION, help="Of a graceful stop.")
@click.option("--kill-timeout", default="5s", type=DURATION, help="From TERM to KILL.")
@click.option("--backlog", default=4096, type=click.IntRange(1), help="Waiting in the kernel.")
@click.option(
    "--queue",
    default=256,
    type=click.IntRange(SMALLEST_QUEUE),
    help="Sent to the workers and not yet taken.",
)
@click.option("--user", help="Run as this user once the sockets are bound.")
@click.option("--group", help="And as this group.")
@click.option("--chdir", metavar="DIR", help="Where workers start; looked up at each reload.")
@click.option("--umask", callback=_octal, metavar="OCTAL", help="Of the workers.")
@click.option(
    "--limit",
    multiple=True,
    callback=_pairs,
    metavar="NAME=N",
    help="Of the workers: nofile, core, nice.  Again for more.",
)
@click.option(
    "--env",
    multiple=True,
    callback=_pairs,
    metavar="NAME=VALUE",
    help="For the workers.  Again for more.",
)
@click.option("--env-file", metavar="FILE", help="NAME=VALUE lines, read again at each reload.")
@click.option("--log-file", metavar="FILE", help="For the protector and the workers.")
@click.option("--log-level", default="info", type=click.Choice(list(LEVELS)))
@click.version_option(__version__, prog_name="SocketProtector")
@click.pass_context
def _command(ctx: click.Context, /, **options: Any) -> int:
    """Own the listening sockets of a daemon, so that it can be restarted, upgraded or crash
    and nobody who connects notices.

    LISTEN is PORT, HOST:PORT, [HOST6]:PORT, unix:PATH or unix:@NAME, with options as in
    4321?backlog=100&defer_accept=5 or unix:/run/x.sock?mode=0660&user=www&group=www.

    Signals: HUP reload; TERM, QUIT stop; INT stop at once; USR1 reopen the log file;
    TTIN, TTOU one worker more, fewer.
    """
    command: list[str] = ctx.obj
    if not options["listen"]:
        raise UsageError("no LISTEN; write e.g. SocketProtector 4321 -- ./daemon 4321")
    if not command:
        raise UsageError("no command; put it behind --, e.g. SocketProtector 4321 -- ./daemon 4321")
    directory = _here()
    listens = [parse(text, directory) for text in options["listen"]]
    settings = _settings(options, command, directory)
    _check_command(settings)
    _check_pid_file(settings.pid_file)
    bound = bind_all(listens, options["backlog"], notice=_notice, dry=options["check"])
    if options["check"]:
        print(f"SocketProtector: would start {' '.join(command)} on {' '.join(options['listen'])}")
        return 0
    try:
        return _start(settings, listens, bound, options["backlog"])
    except BaseException:
        for each in bound:
            each.discard()
        raise


def _start(
    settings: Settings, listens: Sequence[Listen], bound: Sequence[Bound], backlog: int
) -> int:
    settings = settings.listening(tuple(each.settings for each in bound))
    _warn(settings, listens, backlog)
    if any(listen.path is None and listen.port == 0 for listen in listens):
        chosen = " ".join(each.settings.address for each in bound)
        print(f"SocketProtector: listening on {chosen}", flush=True)
    # Nothing secret may stand there: of the options only the name is shown.
    label = [settings.name, *(each.settings.address for each in bound), "--", settings.command[0]]
    return launch(settings, bound, label)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at the first `--`, which click would drop; give old long options their second dash."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    options = [
        f"-{word}" if word.partition("=")[0] in _SINGLE_DASH else word for word in words[:at]
    ]
    return options, words[at + 1 :]


def _here() -> str:
    """The caller's directory, by the name it has for him: a symlink in it is meant."""
    logical = os.environ.get("PWD", "")
    try:
        if os.path.isabs(logical) and os.path.samefile(logical, "."):
            return logical
        return os.getcwd()
    except OSError as error:
        raise SystemRefused(f"cannot tell the current directory: {error.strerror}") from error


def _settings(options: dict[str, Any], command: list[str], directory: str) -> Settings:
    """Check the options and resolve their paths against the caller's directory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = {name: _limit(name, value) for name, value in options["limit"].items()}
    nice = limits.pop("nice", 0)
    if limits.get("nofile", 0) > hard:
        raise UsageError(f"--limit nofile={limits['nofile']}: the hard limit is {hard}; raise that")
    start = os.path.join(directory, options["chdir"]) if options["chdir"] else directory
    if not os.path.isdir(start):
        raise UsageError(f"--chdir {options['chdir']}: no such directory")
    umask = os.umask(0o022)
    os.umask(umask)

    def path(name: str) -> str | None:
        return os.path.join(directory, options[name]) if options[name] else None

    return Settings(
        name=options["name"] or os.path.basename(command[0]),
        command=_anchored(command, directory),
        directory=start,
        policy=Policy(
            start_tries=options["start_tries"],
            start_timeout_s=options["start_timeout"],
            settle_s=options["settle"],
            drain_timeout_s=options["drain_timeout"],
            max_draining=options["max_draining"],
            stop_timeout_s=options["stop_timeout"],
            kill_timeout_s=options["kill_timeout"],
            stop_first=options["reload_order"] == "stop-first",
        ),
        workers=options["workers"],
        ready_after_s=options["ready"],
        queue=options["queue"],
        identity=_identity(options["user"], options["group"]),
        umask=umask if options["umask"] is None else options["umask"],
        nofile_soft=soft,
        limits=tuple(limits.items()),
        nice=nice,
        environment=tuple(options["env"].items()),
        env_file=path("env_file"),
        pid_file=path("pid_file"),
        log_file=path("log_file"),
        log_level="debug" if options["verbose"] else options["log_level"],
        foreground=options["foreground"],
    )


def _anchored(command: list[str], directory: str) -> tuple[str, ...]:
    """Take a relative command against the caller's directory, whatever --chdir says."""
    name = command[0]
    return (os.path.join(directory, name) if "/" in name else name, *command[1:])


def _limit(name: str, value: str) -> int:
    if name not in ("nofile", "core", "nice"):
        raise UsageError(f"--limit {name}: unknown; allowed: nofile, core, nice")
    if value == "unlimited" and name == "core":
        return resource.RLIM_INFINITY
    try:
        number = int(value)
    except ValueError:
        raise UsageError(f"--limit {name}={value}: not a whole number") from None
    low, high = (-20, 19) if name == "nice" else (0, 2**63)
    if not low <= number <= high:
        raise UsageError(f"--limit {name}={value}: must be from {low} to {high}")
    return number


def _identity(user: str | None, group: str | None) -> Identity | None:
    """Look up --user and --group; None when neither is given."""
    if user is None and group is None:
        return None
    if os.geteuid() != 0:
        raise UsageError("--user and --group need root; leave them out or start as root")
    try:
        entry = _find(user or str(os.getuid()), pwd.getpwuid, pwd.getpwnam)
    except KeyError:
        raise UsageError(f"--user {user}: unknown user") from None
    gid, groups = entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
    if group is not None:
        try:
            gid = _find(group, grp.getgrgid, grp.getgrnam).gr_gid
        except KeyError:
            raise UsageError(f"--group {group}: unknown group") from None
        groups = os.getgrouplist(entry.pw_name, gid)
    return Identity(entry.pw_name, entry.pw_uid, gid, tuple(groups))


def _find(name: str, by_number: Callable[[int], T], by_name: Callable[[str], T]) -> T:
    return by_number(int(name)) if name.isdigit() else by_name(name)


def _check_command(settings: Settings) -> None:
    """Refuse a command that could not be started now, while somebody reads it."""
    try:
        environment = {**os.environ}
        if settings.env_file is not None:
            environment.update(envfile.read(settings.env_file))
        environment.update(settings.environment)
        search = environment.get("PATH", os.defpath)
        process.resolve(settings.command, settings.directory, search)
    except OSError as error:
        raise UsageError(
            f"cannot run {error.filename}: {error.strerror}; check the path and its x bit"
        ) from error
    except ValueError as error:
        raise UsageError(f"--env-file: {error}") from error


def _check_pid_file(path: str | None) -> None:
    """Refuse early what would otherwise show as `port in use`."""
    if path is None:
        return
    try:
        holder = PidFile(path).holder()
    except OSError as error:
        raise SystemRefused(f"cannot read the pid file {path}: {error.strerror}") from error
    if holder is not None:
        raise AlreadyRunning(
            f"the pid file {path} is held by process {holder}; stop or reload that one"
        )
    folder = os.path.dirname(path)
    if not os.access(folder, os.W_OK):
        raise SystemRefused(f"cannot write the pid file {path}: check {folder} and its rights")


def _notice(text: str) -> None:
    print(f"SocketProtector: {text}", file=sys.stderr)


def _warn(settings: Settings, listens: Sequence[Listen], backlog: int) -> None:
    """Say what will work less well than the operator may think."""
    try:
        with open(_SOMAXCONN, encoding="ascii") as file:
            most = int(file.read())
    except (OSError, ValueError):
        most = 0
    asked = max(listen.backlog(backlog) for listen in listens)
    if most and asked > most:
        _notice(f"backlog {asked} is cut to {most}: raise the sysctl net.core.somaxconn")
    if settings.identity is None:
        return
    files = [settings.pid_file, settings.log_file]
    files += [each.address.removeprefix("unix:") for each in settings.listeners if each.inode]
    for folder in dict.fromkeys(os.path.dirname(file) for file in files if file):
        if os.stat(folder).st_uid != settings.identity.uid:
            _notice(
                f"{folder} is not {settings.identity.user}'s: files there cannot be removed or "
                "opened anew later"
            )


def main(arguments: Sequence[str]) -> int:
    """Parse, check and launch.  Returns the exit status."""
    options, command = _split(arguments)
    try:
        return int(
            _command.main(options, prog_name="SocketProtector", standalone_mode=False, obj=command)
            or 0
        )
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        print(f"SocketProtector: {error.format_message()}; see --help", file=sys.stderr)
        return error.exit_code
    except Refusal as error:
        print(f"SocketProtector: {error}", file=sys.stderr)
        return error.status
