"""The command line of socketprotectorctl: instance options, then a command with its own.

Every error is one line: what, where, how to fix it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, TypeVar

import click

from .. import __version__
from ..model.errors import UsageError
from ..model.text import escape
from . import discovery
from .client import ANSWER_S, Client
from .session import Session

NAME = "socketprotectorctl"
Function = TypeVar("Function", bound=Callable[..., Any])


class OutputClosed(Exception):
    """The reader of the answer has gone (`| head`): no mistake.  click would make it status 1."""


class Interrupted(Exception):
    """INT or TERM came.  click would say an empty line."""


@dataclass(frozen=True, slots=True)
class Instance:
    """Which protector is meant; looked for when a command asks."""

    name: str | None = None
    control: str | None = None
    pid_file: str | None = None

    def path(self) -> str:
        """Return its control socket.  Raises NoProtector, UsageError."""
        if self.control is not None:
            return os.path.abspath(self.control)
        if self.name is not None:
            return discovery.by_name(self.name)
        if self.pid_file is not None:
            return discovery.by_pid_file(self.pid_file)
        return discovery.the_only_one()

    def client(self, answer_s: float = ANSWER_S) -> Client:
        """Return a connection for a request or two."""
        return Client(self.path(), answer_s)

    def session(self, *, events: bool = False) -> Session:
        """Return a connection that comes back after an upgrade or a crash."""
        return Session(self.path(), events=events)


def _known_names(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    return [name for name in discovery.names(discovery.everything()) if name.startswith(begun)]


@click.group(
    context_settings={"help_option_names": ["-h", "-?", "--help"], "show_default": True},
    no_args_is_help=False,
    invoke_without_command=True,
    options_metavar="[--name NAME | --control PATH | --pid-file FILE]",
    subcommand_metavar="COMMAND [ARG...]",
)
@click.option("--name", shell_complete=_known_names, help="The protector of that name.")
@click.option(
    "--control", metavar="PATH", type=click.Path(), help="The protector with that control socket."
)
@click.option(
    "--pid-file", metavar="FILE", type=click.Path(), help="The protector whose pid is in this file."
)
@click.version_option(__version__, prog_name=NAME)
@click.pass_context
def program(
    ctx: click.Context, name: str | None, control: str | None, pid_file: str | None
) -> None:
    """Look at a SocketProtector that runs, and tell it what to do.

    Without an option: the only one that runs.  It may stand behind the command, too.
    Each command has --json.

    \b
    Exit status:
      0    done
      1    no protector is there, or it was lost for good
      2    the command line is wrong
      3    reload, upgrade: the new version was not taken, the old one serves;
           diff: the configuration is not valid
      4    not done within --timeout; it may still come
      100  the protector refuses, or does not let this user ask
      130  interrupted
    """
    given = [
        f"--{option}"
        for option, value in (("name", name), ("control", control), ("pid-file", pid_file))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: only one of them")
    if ctx.invoked_subcommand is None:
        raise UsageError(f"no command; there are {', '.join(program.list_commands(ctx))}")
    ctx.obj = Instance(name, control, pid_file)


def _also_behind(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Take an instance option behind the command as the one before it."""
    if value is None:
        return
    instance = ctx.obj or Instance()
    given = [field.name for field in fields(instance) if getattr(instance, field.name) is not None]
    if given:
        options = (f"--{each}".replace("_", "-") for each in (*given, param.name))
        raise UsageError(f"{' and '.join(options)}: only one of them")
    ctx.obj = replace(instance, **{str(param.name): value})


def _instance_options(function: Function) -> Function:
    """Give a command the options of the program, which may stand behind it, too."""
    for option in program.params:
        if option.name in Instance.__slots__ and isinstance(option, click.Option):
            function = click.option(
                *option.opts,
                type=option.type,
                metavar=option.metavar,
                hidden=True,
                expose_value=False,
                callback=_also_behind,
            )(function)
    return function


def command(name: str | None = None, **settings: Any) -> Callable[[Function], click.Command]:
    """Make a command of a function: its instance first, `as_json` among its arguments."""

    def made(function: Function) -> click.Command:
        with_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
        answers = _instance_options(with_json(click.pass_obj(written(function))))
        return program.command(name, **settings)(answers)

    def written(function: Function) -> Callable[..., Any]:
        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            try:
                result = function(*arguments, **options)
                sys.stdout.flush()
                return result
            except BrokenPipeError:
                raise OutputClosed from None
            except KeyboardInterrupt:
                raise Interrupted from None

        return run

    return made


# -- what is said -------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line of the answer."""
    print(escape(text), flush=True)


def say_json(value: Any) -> None:
    """Say a value as one line; nothing in it can drive a terminal."""
    # ensure_ascii leaves only DEL of the control characters.
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


def tell(text: str) -> None:
    """Say what is not the answer: progress, warnings, mistakes.  stderr may be closed."""
    lines = [escape(line) for line in text.split("\n")]
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def complain(text: str) -> None:
    """Tell a mistake."""
    tell(f"{NAME}: {text}")
