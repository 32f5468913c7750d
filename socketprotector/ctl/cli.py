"""What all commands share: --json, the options that choose a protector, and the output."""

from __future__ import annotations

import errno
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any, TypeVar

import click

from .. import __version__
from ..model.errors import Refusal, UsageError, what_failed
from ..model.text import escape
from ..system.answer import discard_output
from . import discovery
from .client import ANSWER_S, Client, Message
from .help_pages import GROUPS, HelpGroup, print_full_help

NAME = "socketprotectorctl"
#: Matches a command in backquotes, such as `status`, in a message.  with_instance() adds the
#: instance option (--name, --control or --pid-file) to each match.  `list` refuses the instance
#: option, and `completion` ignores it, so neither command matches.
_COMMAND = re.compile(
    rf"`(?:{NAME} )?((?:{'|'.join({*sum(GROUPS.values(), ())} - {'list', 'completion'})})\b[^`]*)`"
)
#: The prefix of each printed line of a worker's last words (the last lines of a failed worker's
#: output).  with_instance() leaves lines with this prefix unchanged.  quoted() of reload.py must
#: use the same prefix.
_QUOTED = "  | "
Function = TypeVar("Function", bound=Callable[..., Any])


class OutputClosed(Exception):
    """The reader of stdout, such as `head`, has exited.  Exit with 0; click would exit with 1."""


class OutputFailed(Refusal):
    """A command failed with an OSError, usually because stdout cannot be written (a full disk)."""

    status = 1


class Interrupted(Exception):
    """INT or TERM came.  Replaces KeyboardInterrupt, for which click prints an empty line."""


@dataclass(frozen=True, slots=True)
class Instance:
    """The instance option: --name, --control or --pid-file, which chooses the protector.

    At most one field is set.  If none is set, path() finds the only running protector.
    """

    name: str | None = None
    control: str | None = None
    pid_file: str | None = None

    def command_line(self, words: str) -> str:
        """Return the complete command line for a command.  words: the command and its arguments."""
        options = {"--name": self.name, "--control": self.control, "--pid-file": self.pid_file}
        given = [word for name, value in options.items() if value for word in (name, value)]
        return " ".join((NAME, *map(shlex.quote, given), words))

    def path(self) -> str:
        """Return the path of the chosen protector's socket.  Raises NoProtector, UsageError."""
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
        """Return a new connection to the protector; the caller closes it.

        The arguments are those of Client.__init__() in client.py.
        Raises NoProtector, RequestRefused, UsageError.
        """
        return Client(self.path(), answer_s, events=events, until=until)

    def request(self, command: str, **arguments: Any) -> Message:
        """Send a request over a new connection and return the result.

        Raises ControlError (errors.py), UsageError.
        """
        with self.client() as client:
            return client.request(command, **arguments)


def _store_instance(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Store an instance option.  Raises UsageError if an instance option is stored already.

    click calls this function for the options before the command, and again for those after the
    command.  value: None if the option was not given.
    """
    if value is None:
        return
    stored = [name for name, text in asdict(ctx.obj or Instance()).items() if text is not None]
    if stored:
        options = (f"--{each}".replace("_", "-") for each in (*stored, param.name))
        raise UsageError(f"{' and '.join(options)}: give only one of them")
    ctx.obj = Instance(**{str(param.name): value})


def _complete_name(_: click.Context, __: click.Parameter, typed: str) -> list[str]:
    """Return the protectors' names that begin with the typed text."""
    return discovery.names_with_prefix(typed)


def _instance_options(function: Function, *, hidden: bool = False) -> Function:
    """Return the program, or one of its commands, with the instance options added.

    hidden: whether the page of --help leaves these options out.
    """
    for name, metavar, text in (
        ("pid-file", "FILE", "Choose the protector with this pid file."),
        ("control", "PATH", "Choose the protector with this control socket."),
        ("name", "NAME", "Choose the protector with this name."),
    ):
        function = click.option(
            f"--{name}",
            metavar=metavar,
            # click.Path makes shells complete files.  readable=False: the command itself, not
            # click, reports a missing permission.
            type=None if name == "name" else click.Path(readable=False),
            shell_complete=_complete_name if name == "name" else None,
            hidden=hidden,
            expose_value=False,
            callback=_store_instance,
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
    help="Show every command and exit status, and exit.",
)
@click.pass_context
def program(ctx: click.Context) -> None:
    """Run a command for one instance."""
    if ctx.invoked_subcommand is None:
        raise UsageError(f"no command; choose one of {', '.join(program.list_commands(ctx))}")
    ctx.ensure_object(Instance)


def command(name: str | None = None, **settings: Any) -> Callable[[Function], click.Command]:
    """Return a decorator that turns a function into a command.

    The function gets the Instance as its first argument, and the flag --json as `as_json`.
    name, settings: as for click.Group.command().
    """

    def decorate(function: Function) -> click.Command:
        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            try:
                result = function(*arguments, **options)
                sys.stdout.flush()
                return result
            except Refusal as error:
                error.args = (with_instance(str(error)),)
                raise
            except BrokenPipeError:
                raise OutputClosed from None
            except OSError as error:
                no_descriptor = error.errno in (errno.EMFILE, errno.ENFILE)
                cannot = "run the command" if no_descriptor else "write the output"
                raise OutputFailed(f"cannot {cannot}: {what_failed(error)}") from error
            except KeyboardInterrupt:
                raise Interrupted from None

        with_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
        with_options = _instance_options(with_json(click.pass_obj(run)), hidden=True)
        return program.command(name, **settings)(with_options)

    return decorate


# -- output -------------------------------------------------------------------------


def with_instance(text: str) -> str:
    """Return a message whose commands, such as `status`, can be pasted into a shell.

    Each command gets the name of this program and the instance option that the operator gave.
    Lines of a worker's last words (see _QUOTED) stay unchanged.
    """
    context = click.get_current_context(silent=True)
    instance = context.find_object(Instance) if context is not None else None
    instance = instance or Instance()

    def completed(found: re.Match[str]) -> str:
        return f"`{instance.command_line(found[1])}`"

    lines = text.split("\n")
    return "\n".join(
        line if line.startswith(_QUOTED) else _COMMAND.sub(completed, line) for line in lines
    )


def say(text: str) -> None:
    """Print a line to stdout, escaped so that the line cannot control the terminal."""
    print(escape(text), flush=True)


def say_json(value: Any) -> None:
    """Print a value as one line of JSON without control characters."""
    # json.dumps escapes every control character except DEL.
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


def plural(number: int, noun: str, plural_noun: str = "") -> str:
    """Return the noun in the form for this number: singular for 1, otherwise plural."""
    return noun if number == 1 else plural_noun or f"{noun}s"


def say_result(as_json: bool, result: Message, words: str) -> None:
    """Print a command's outcome: the words, or with --json the result that the protector sent."""
    if as_json:
        say_outcome(say_json, result)
    else:
        say_outcome(say, with_instance(words))


def say_outcome(printer: Callable[[Any], None], outcome: Any) -> None:
    """Call `printer` with a command's outcome.

    The exit status reports the outcome, even if printing the outcome fails.
    """
    try:
        printer(outcome)
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            complain(f"cannot write the outcome to stdout: {what_failed(error)}")


def say_last_words(text: str) -> None:
    """Print a worker's last words, with _QUOTED before each line."""
    for line in text.strip("\n").split("\n"):
        if line:
            say(f"{_QUOTED}{line}")


def tell(text: str) -> None:
    """Print progress, a warning or an error to stderr.  A failure to print is ignored."""
    lines = [escape(line) for line in text.split("\n")]
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def complain(text: str) -> None:
    """Print an error to stderr, prefixed with `socketprotectorctl:`."""
    tell(f"{NAME}: {text}")
