"""From outside: run one command of the line, and say in one line what went wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click

from ..model.errors import Refusal
from . import completion, orders, queries, reload, top
from .cli import NAME, Interrupted, ReadEnough, complain, program

#: Each has added its commands to the program.
COMMANDS = (orders, completion, queries, reload, top)
INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Run one command.  Returns the exit status."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        status = program.main(list(arguments), prog_name=NAME, standalone_mode=False)
        return int(status or 0)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (Interrupted, click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        message = error.format_message().rstrip(".").replace("\n", " ")
        complain(f"{message}; see {_help(error)}")
        return error.exit_code
    except Refusal as error:
        complain(str(error))
        return error.status
    except ReadEnough:
        # What is not written yet must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _help(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    return f"{ctx.command_path if ctx else NAME} --help"


def _terminated(_: int, __: object) -> None:
    raise KeyboardInterrupt
