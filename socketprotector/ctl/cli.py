"""The command line of socketprotectorctl: instance options, a command, the command's options.

Every error is one line: what failed, where, and how to fix it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any, TypeVar

import click

from .. import __version__
from ..model.errors import Refusal, UsageError, what_failed
from ..model.text import escape
from . import discovery
from .client import ANSWER_S, Client, Message
from .help_pages import HelpGroup, print_full_help

NAME = "socketprotectorctl"
Function = TypeVar("Function", bound=Callable[..., Any])


class OutputClosed(Exception):
    """The reader of stdout has exited (`| head`), which is no error; click would exit with 1."""


class OutputFailed(Refusal):
    """The answer cannot be written (a full disk, for example), or an OSError came first."""

    status = 1


class Interrupted(Exception):
    """INT or TERM came.  For KeyboardInterrupt click would print an empty line."""


@dataclass(frozen=True, slots=True)
class Instance:
    """The protector that the options name; the first request looks for its socket."""

    name: str | None = None
    control: str | None = None
    pid_file: str | None = None

    def path(self) -> str:
        """Return its control socket.  Raises NoProtector, UsageError."""
        if self.control is not None:
            return discovery.by_path(self.control)
        if self.name is not None:
            return discovery.by_name(self.name)
        if self.pid_file is not None:
            return discovery.by_pid_file(self.pid_file)
        return discovery.the_only_one()

    def client(
        self, answer_s: float = ANSWER_S, *, events: bool = False, until: float = math.inf
    ) -> Client:
        """Return a new connection, which the caller closes.  Raises NoProtector, UsageError.

        answer_s: how long an answer may take.  events: follow events.  until: see Client.
        """
        return Client(self.path(), answer_s, events=events, until=until)

    def request(self, command: str, **arguments: Any) -> Message:
        """Send a request over a new connection, and return its result.

        Raises ControlError, UsageError.
        """
        with self.client() as client:
            return client.request(command, **arguments)


def _take(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Store an instance option, given before or after the command."""
    if value is None:
        return
    given = [name for name, before in asdict(ctx.obj or Instance()).items() if before is not None]
    if given:
        options = (f"--{each}".replace("_", "-") for each in (*given, param.name))
        raise UsageError(f"{' and '.join(options)}: only one of them")
    ctx.obj = Instance(**{str(param.name): value})


def _complete_name(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """Return the names of running protectors that begin with this text."""
    return discovery.running(begun)


def _instance_options(function: Function, *, hidden: bool = False) -> Function:
    """Add the options that choose an instance, to the program or to one of its commands."""
    for name, metavar, text in (
        ("pid-file", "FILE", "Choose it by its pid file."),
        ("control", "PATH", "Choose it by its control socket."),
        ("name", "NAME", "Choose the protector of this name."),
    ):
        function = click.option(
            f"--{name}",
            metavar=metavar,
            # A path, so that shells complete files; a request reports a missing permission.
            type=None if name == "name" else click.Path(readable=False),
            shell_complete=_complete_name if name == "name" else None,
            hidden=hidden,
            expose_value=False,
            callback=_take,
            help=text,
        )(function)
    return function


@click.group(
    cls=HelpGroup,
    context_settings={"help_option_names": ["-h", "-?", "--help"], "show_default": True},
    invoke_without_command=True,
    options_metavar="[--name NAME | --control PATH | --pid-file FILE]",
    subcommand_metavar="COMMAND [ARG...]",
)
@_instance_options
@click.version_option(__version__, prog_name=NAME)
@click.option(
    "--help-all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_full_help,
    help="Show every command and exit.",
)
@click.pass_context
def program(ctx: click.Context) -> None:
    """Run a command for one instance."""
    if ctx.invoked_subcommand is None:
        raise UsageError(f"no command; there are {', '.join(program.list_commands(ctx))}")
    ctx.ensure_object(Instance)


def command(name: str | None = None, **settings: Any) -> Callable[[Function], click.Command]:
    """Make a command of a function that takes the instance first, and `as_json` by name."""

    def made(function: Function) -> click.Command:
        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            try:
                result = function(*arguments, **options)
                sys.stdout.flush()
                return result
            except BrokenPipeError:
                raise OutputClosed from None
            except OSError as error:
                raise OutputFailed(f"cannot answer: {what_failed(error)}") from error
            except KeyboardInterrupt:
                raise Interrupted from None

        with_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
        answers = _instance_options(with_json(click.pass_obj(run)), hidden=True)
        return program.command(name, **settings)(answers)

    return made


# -- output -------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line of the answer, escaped, so that it cannot control the terminal."""
    print(escape(text), flush=True)


def say_json(value: Any) -> None:
    """Print a value as one line of JSON, which cannot control the terminal."""
    # The only control character that ensure_ascii leaves is DEL.
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


def plural(number: int, one: str, more: str = "") -> str:
    """Return the singular for 1, and otherwise the plural."""
    return one if number == 1 else more or f"{one}s"


def answer(as_json: bool, result: Message, words: str) -> None:
    """Print the outcome of a command in words, or with --json the protector's result."""
    if as_json:
        say_outcome(say_json, result)
    else:
        say_outcome(say, words)


def say_outcome(print_it: Callable[[Any], None], outcome: Any) -> None:
    """Print the outcome of a command; if that fails, the exit status still reports it."""
    try:
        print_it(outcome)
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            complain(f"cannot write the outcome to stdout: {what_failed(error)}")


def discard_output() -> None:
    """Send the unwritten rest of stdout, and all later output, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_last_words(text: str) -> None:
    """Print a worker's last words, indented below the preceding line."""
    for line in text.strip("\n").split("\n"):
        if line:
            say(f"  | {line}")


def tell(text: str) -> None:
    """Print progress, warnings and errors to stderr, which may be closed."""
    lines = [escape(line) for line in text.split("\n")]
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def complain(text: str) -> None:
    """Print an error to stderr, after the command's name."""
    tell(f"{NAME}: {text}")
