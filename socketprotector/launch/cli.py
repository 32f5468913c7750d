"""The command line: options in, checked and resolved settings out; then launch.

Whatever is wrong is one line: what, where, what to do.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..model import known_servers
from ..model.errors import Refusal, UsageError
from ..model.settings import ListenerSettings, Settings
from ..system import inherited
from ..system.terminal import STDERR, STDOUT, tell
from . import activation, notify_dir, options, preflight, stored_listeners
from .bind_control import default_path
from .bind_tcp import Bound, bind_all, not_bound, pair
from .listen_spec import Listen
from .resolve import Asked, Purpose, Reading
from .start import launch

if TYPE_CHECKING:
    from .config_file import ConfigFile

_FILE = "socketprotector.launch.config_file"
#: What asks a resident process for something: kept until there is one.
_FOR_LATER = (
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


class _Command(click.Command):
    """Shows its options in their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = {name: each for each in self.get_params(ctx) for name in each.opts}
        for title, group in options.GROUPS.items():
            rows = (found[f"--{each.name}"].get_help_record(ctx) for each in group)
            with formatter.section(title):
                formatter.write_dl([row for row in rows if row is not None])


def _read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Have the file's values in the place of the defaults."""
    if value is not None:
        from .config_file import ConfigFile  # with tomllib: only for those who have one

        file = ConfigFile(os.path.join(ctx.obj.directory, value))
        ctx.default_map = file.values
        ctx.meta[_FILE] = file


def _parameters() -> list[click.Parameter]:
    """Return what the command line is made of; click adds --version and --help."""
    reads: dict[str, Any] = {"is_eager": True, "expose_value": False, "callback": _read_config}
    return [
        click.Argument(["listen"], nargs=-1, metavar="LISTEN... -- COMMAND [ARG...]"),
        *(
            each.as_click(**(reads if each.name == "config" else {}))
            for each in options.OPTIONS
            if each.kind is not None
        ),
    ]


@click.version_option(__version__, prog_name="SocketProtector")
@click.command(
    cls=_Command,
    params=_parameters(),
    context_settings={"help_option_names": ["-h", "-?", "--help"], "show_default": True},
    options_metavar="[OPTIONS]",
    epilog=known_servers.table(),
)
@click.pass_context
def _command(ctx: click.Context, /, **given: Any) -> int:
    """Own the listening sockets of a daemon, so that it can be restarted or upgraded, or crash,
    without clients noticing.

    LISTEN is PORT, HOST:PORT, [HOST6]:PORT, unix:PATH, unix:@NAME or fd:NAME, with options as in
    4321?backlog=100&defer_accept=5 or unix:/run/x.sock?mode=0660&user=www&group=www.

    Signals: HUP reload; TERM, QUIT stop; INT stop at once; USR1 reopen the log file; USR2 replace
    the protector's own program; TTIN, TTOU one worker more, one fewer.

    TIME is 500ms, 10s, 2m, 1h or plain seconds.
    """
    purpose: Purpose = ctx.obj
    file: ConfigFile | None = ctx.meta.get(_FILE)
    return purpose.act(Reading(ctx, purpose, file, given).asked())


def _launch(asked: Asked) -> int:
    """Bind and go on to a resident process; or only say whether that could be done."""
    settings = asked.settings
    preflight.kernel()
    preflight.pid_file(settings.pid_file, check=asked.check)
    preflight.log_file(settings.log_file)
    notices = [*asked.notices]
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
    purpose = Purpose(tuple(arguments), command, running, act)
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
