"""Turns the command line into checked and resolved settings, then launches.

Every error is one line that says what failed, where, and how to fix it.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import click

from ..model.errors import Mistaken, Refusal, SystemRefused, UsageError
from ..model.settings import ListenerSettings, Settings
from ..model.text import escape, in_one_line
from ..system import inherited, signals
from ..system.answer import answering
from ..system.cleanup import on_error
from ..system.terminal import STDERR, STDOUT, open_missing_standard_streams, tell
from . import (
    activation,
    kernel_calls,
    notify_dir,
    options,
    port_owner,
    preflight,
    rollout_checks,
    server_hints,
    stored_listeners,
)
from .bind import bind_all, could_pair, discard_all, pair, reserve
from .bind_control import default_path
from .bind_unix import why_alone
from .help_pages import HelpCommand
from .resolve import OptionResolver, ParsedOptions
from .rights import Rights
from .start import launch


def _read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Use the values in the configuration file as defaults."""
    if value is not None and not ctx.resilient_parsing:
        from .config_file import ConfigFile  # late, because it loads tomllib

        ctx.obj.file = ConfigFile(os.path.join(ctx.obj.directory, value))
        ctx.default_map = ctx.obj.file.values


options.CONFIG.callback = _read_config


def _resolve(**given: Any) -> ParsedOptions:
    ctx = click.get_current_context()
    resolver: OptionResolver = ctx.obj
    return resolver.resolve(ctx, given)


COMMAND = HelpCommand(
    None,
    callback=_resolve,
    params=[
        click.Argument(["listen"], nargs=-1, metavar="LISTEN... -- COMMAND [ARG...]"),
        *options.OPTIONS,
    ],
    add_help_option=False,
    options_metavar="[OPTIONS]",
)


def _launch(parsed: ParsedOptions) -> int:
    """Bind, and start the resident process.  With --check, only report whether that would work."""
    settings, check, listens = parsed.settings, parsed.check, parsed.listens
    if not os.path.isfile(__file__):  # Python cannot run guard.py from inside a wheel
        raise SystemRefused("running from a zip or wheel is not supported; pip install it")
    kernel_calls.check()
    if parsed.control != "":
        path = parsed.control or default_path(settings.name)
        settings = replace(settings, control=ListenerSettings(f"unix:{path}"))
    files = _files_of(parsed)
    if parsed.control:
        preflight.check_control(parsed.control, files)
    control = settings.control.address.removeprefix("unix:") if settings.control else None
    files["--control"] = control
    holder = preflight.check_pid_file(settings.pid_file, files, check=check)
    program = settings.command[0]
    files["the command"] = os.path.join(settings.directory, program) if "/" in program else None
    preflight.check_log_file(settings.log_file, files)
    given = activation.passed()
    passed = activation.take(listens, given)
    notices = [*activation.close_unused(given.given, passed)]
    if check and parsed.control:
        notices += preflight.control_notices(parsed.control)
    kept, released = {}, frozenset[str]()
    if holder:
        released = port_owner.addresses_of(holder)
        notice = f"process {holder} runs with this pid file; --check assumes that it has ended"
        if settings.origin.configured:
            path = shlex.quote(str(settings.pid_file))
            diff = f"socketprotectorctl --pid-file {path} diff"
            notice += f"; if it uses this configuration, `{diff}` shows what a reload would change"
        notices.append(notice)
    if not check:
        kept = stored_listeners.take(
            *(listens, passed, given.inherited, parsed.backlog, notices.append),
            same_name=settings.mode.workers_accept,
        )
    alone = partial(why_alone, identity=settings.identity)
    bound = bind_all(
        listens,
        parsed.backlog,
        notice=notices.append,
        passed=passed,
        inherited=kept,
        released=released,
        alone=alone if settings.mode.workers_accept else None,
        dry=check,
    )
    named = {f"{inherited.LISTENER}{index}": each for index, each in enumerate(bound)}
    with on_error(discard_all, bound):
        settings = replace(settings, listeners=tuple(each.settings for each in bound))
        preflight.check_descriptor_names(settings)
        notices += preflight.syslog_notices(settings)
        warnings = [*preflight.notices(settings, listens, parsed.backlog)]
        notices += [*warnings, *server_hints.drain_limits(settings)]
        if check:
            notify_dir.make(settings, notices.append, dry=True)
            rollout_checks.check_siblings(settings, could_pair(bound))
        elif settings.policy.workers_accept:
            siblings = pair(bound, listens, notices.append, alone)
            listeners = (siblings.get(n, each).settings for n, each in enumerate(bound))
            settings = replace(settings, listeners=tuple(listeners))
            reserved = reserve(bound)
            bound += (*siblings.values(), *reserved.values())
            preflight.check_siblings(settings, siblings.keys())
            rollout_checks.check_siblings(settings, siblings.keys())
            named |= {f"{inherited.SIBLING}{index}": each for index, each in siblings.items()}
            named |= {f"{inherited.RESERVED}{index}": each for index, each in reserved.items()}
        # With -f and no log file, the log goes to stderr, and will contain the notices.
        log_elsewhere = check or not (settings.foreground and settings.log_file is None)
        terminal = os.isatty(STDERR)
        printed = notices if log_elsewhere else []
        if log_elsewhere or terminal:
            printed = [*printed, *server_hints.of(settings, listens, typed=True)]
        for notice in printed:
            tell(escape(notice))
        hints = [*server_hints.of(settings, listens, typed=False)]
        notices += hints if log_elsewhere or not terminal else []
        warnings += hints
        if check:
            valid = f"{parsed.config} is valid; " if parsed.config else ""
            texts = " ".join(listen.text for listen in listens)
            what = f"{valid}would start {' '.join(settings.command)} on {texts}"
            with answering():
                print(f"SocketProtector: {escape(what)}")
            return 0
        if any(each.port_is_chosen for each in listens):
            addresses = " ".join(each.address for each in settings.listeners)
            tell(escape(f"listening on {addresses}"), STDOUT)
        stored_listeners.store(given, named)
        settings = replace(settings, notices=tuple(notices), warnings=tuple(warnings))
        return launch(settings, named)


def _files_of(parsed: ParsedOptions) -> dict[str, str | None]:
    """Return the files that options name, by option; no file that we write may be one of them."""
    return {
        "--config": parsed.config,
        "--env-file": parsed.settings.env_file,
        "--log-file": parsed.settings.log_file,
        **{each.text: each.path for each in parsed.listens},
    }


def parse(arguments: Sequence[str], running: Settings | None = None) -> ParsedOptions | None:
    """Read a command line and its configuration file; return the parsed options.  Raises Refusal.

    Returns None if the command line only requested help, which click has printed.
    running: at a reload, the settings of the running protector.
    """
    words, command = options.split(arguments)
    resolver = OptionResolver(arguments, command, running)
    try:
        found = COMMAND.main(
            words, prog_name="SocketProtector", standalone_mode=False, obj=resolver
        )
    except click.ClickException as error:
        message = in_one_line(error.format_message())
        raise UsageError(f"{message}; see --help") from error
    return found if isinstance(found, ParsedOptions) else None  # None: click has printed help


def rights_of(arguments: Sequence[str]) -> Rights:
    """Return the rights that a command line and its configuration file name.  Raises Refusal.

    Mistakes in the file that concern no right are ignored: the file may be being edited.
    """
    words, command = options.split(arguments)
    resolver = OptionResolver(arguments, command, None)
    try:
        return resolver.rights(COMMAND.make_context("SocketProtector", words, obj=resolver))
    except click.ClickException as error:
        raise UsageError(in_one_line(error.format_message())) from error


def main(arguments: Sequence[str]) -> int:
    """Parse, check and launch.  Returns the exit status."""
    open_missing_standard_streams()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.REQUESTS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: clean up and exit
    try:
        try:
            parsed = parse(arguments)
            return _launch(parsed) if parsed is not None else 0
        except Refusal as error:
            # Escape an error to one line.  A Mistaken already has an escaped line for each mistake.
            tell(str(error) if isinstance(error, Mistaken) else escape(str(error)))
            return error.status
    except (click.Abort, KeyboardInterrupt):  # also while a refusal is printed
        return 130
