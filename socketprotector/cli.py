"""The command line: options in, checked and resolved settings out; then launch.

Whatever is wrong is one line: what, where, what to do.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from . import __version__, activation, checks, options
from .address import parse
from .bind import bind_all
from .channel import SMALLEST_QUEUE
from .errors import Refusal, UsageError
from .fleet import Policy
from .launch import launch
from .line import FORMATS, LEVELS
from .options import Duration
from .settings import Settings
from .terminal import STDOUT, tell

_DURATION = Duration()
_ABOVE_ZERO = Duration(zero=False)
#: More is a mistake, and would not fit the system calls.
_MANY = 1_000_000
#: What asks a resident process for something: kept until there is one.
_FOR_LATER = (
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


@click.command(
    context_settings={"help_option_names": ["-h", "-?", "--help"], "show_default": True},
    options_metavar="[OPTIONS]",
)
@click.argument("listen", nargs=-1, metavar="LISTEN... -- COMMAND [ARG...]")
@click.option("--pid-file", metavar="FILE", help="Write the protector's pid there.")
@click.option("-f", "--foreground", is_flag=True, help="Do not detach.")
@click.option("--guard", is_flag=True, help="Keep a tiny parent that survives the protector.")
@click.option("-v", "--verbose", is_flag=True, help="Log every decision (--log-level debug).")
@click.option("--name", help="Name of this instance.  [default: the command's]")
@click.option("--check", is_flag=True, help="Say whether it would start; start nothing.")
@click.option("--workers", default=1, type=click.IntRange(1, _MANY), help="Processes at once.")
@click.option(
    "--reload-order",
    default="start-first",
    type=click.Choice(["start-first", "stop-first"]),
    help="stop-first: for a daemon that holds something exclusive.",
)
@click.option(
    "--ready",
    default="notify",
    callback=options.ready,
    metavar="notify|after:TIME",
    help="When a worker is ready: it said READY=1, or it lived so long.",
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
@click.option("--user", help="Run as this user once the sockets are bound.")
@click.option("--group", help="And as this group.")
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
@click.option("--log-file", metavar="FILE", help="For the protector and the workers.")
@click.option("--log-level", default="info", type=click.Choice(list(LEVELS)))
@click.option("--log-format", default="text", type=click.Choice(FORMATS), help="Of each line.")
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
    command: list[str] = ctx.obj
    if not given["listen"]:
        raise UsageError("no LISTEN; write e.g. SocketProtector 4321 -- ./daemon 4321")
    if not command:
        raise UsageError("no command; put it behind --, e.g. SocketProtector 4321 -- ./daemon 4321")
    directory = checks.here()
    listens = [parse(text, directory) for text in given["listen"]]
    settings = _settings(given, command, directory)
    checks.command(settings)
    checks.pid_file(settings.pid_file)
    checks.log_file(settings.log_file)
    notices: list[str] = []
    bound = bind_all(
        listens,
        given["backlog"],
        notice=notices.append,
        passed=activation.take(listens, activation.given()),
        dry=given["check"],
    )
    try:
        settings = settings.listening(tuple(each.settings for each in bound))
        notices += checks.notices(settings, listens, given["backlog"])
        if given["check"] or not (settings.foreground and settings.log_file is None):
            for notice in notices:  # else its log says them, in the same place
                tell(notice)
        if given["check"]:
            print(
                f"SocketProtector: would start {' '.join(command)} on {' '.join(given['listen'])}"
            )
            return 0
        addresses = [each.settings.address for each in bound]
        if any(
            listen.path is None and listen.name is None and not listen.port for listen in listens
        ):
            tell(f"listening on {' '.join(addresses)}", STDOUT)
        # Nothing secret may stand there: of the options only the name is shown.
        label = [settings.name, *addresses, "--", settings.command[0]]
        return launch(settings.noticed(notices), bound, label, directory)
    except BaseException:
        for each in bound:
            each.discard()
        raise


def _settings(given: dict[str, Any], command: list[str], directory: str) -> Settings:
    """Check the options and resolve their paths against the caller's directory."""
    limits, nice = options.limits(given["limit"])
    start = os.path.join(directory, given["chdir"]) if given["chdir"] else directory
    if not os.path.isdir(start):
        raise UsageError(f"--chdir {given['chdir']}: no such directory")
    umask = os.umask(0o022)
    os.umask(umask)

    def path(name: str) -> str | None:
        return os.path.join(directory, given[name]) if given[name] else None

    return Settings(
        name=given["name"] or os.path.basename(command[0]),
        command=_anchored(command, directory),
        directory=start,
        policy=Policy(
            start_tries=given["start_tries"],
            start_timeout_s=given["start_timeout"],
            settle_s=given["settle"],
            drain_timeout_s=given["drain_timeout"],
            max_draining=given["max_draining"],
            stop_timeout_s=given["stop_timeout"],
            kill_timeout_s=given["kill_timeout"],
            stop_first=given["reload_order"] == "stop-first",
        ),
        workers=given["workers"],
        ready_after_s=given["ready"],
        queue=given["queue"],
        identity=checks.identity(given["user"], given["group"]),
        worker_identity=checks.worker_identity(given["worker_user"], given["user"]),
        no_new_privileges=given["no_new_privs"],
        umask=umask if given["umask"] is None else given["umask"],
        nofile_soft=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        limits=tuple(limits.items()),
        nice=nice,
        batch=os.sched_getscheduler(0) == os.SCHED_BATCH,
        environment=tuple(given["env"].items()),
        env_file=path("env_file"),
        pid_file=path("pid_file"),
        log_file=path("log_file"),
        log_level="debug" if given["verbose"] else given["log_level"],
        log_format=given["log_format"],
        foreground=given["foreground"],
        guarded=given["guard"],
        outlives_terminal=signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
        secret=os.urandom(12).hex(),
    )


def _anchored(command: list[str], directory: str) -> tuple[str, ...]:
    """Take a relative command against the caller's directory, whatever --chdir says."""
    name = command[0]
    return (os.path.join(directory, name) if "/" in name else name, *command[1:])


def main(arguments: Sequence[str]) -> int:
    """Parse, check and launch.  Returns the exit status."""
    _stand_on_three_descriptors()
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_LATER)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up and go
    words, command = options.split(arguments)
    try:
        status = _command.main(
            words, prog_name="SocketProtector", standalone_mode=False, obj=command
        )
        return int(status or 0)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.ClickException as error:
        message = error.format_message().rstrip(".").replace("\n", " ")
        tell(f"{message}; see --help")
        return error.exit_code
    except Refusal as error:
        tell(str(error))
        return error.status


def _stand_on_three_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: no socket may come to that place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            # ruff: noqa: SIM115 -- it stays open for the life of the process
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))
