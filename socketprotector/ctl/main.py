"""Runs one command of socketprotectorctl.

An error becomes a message on stderr and an exit status (errors.py).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

import click

from ..model.errors import Refusal, UsageError, what_failed
from ..model.text import escape, in_one_line
from ..system.answer import discard_output
from ..system.terminal import keep_exit_status, open_missing_standard_streams
from . import completion_script, deploy, orders, queries, reload, top, upgrade
from .cli import (
    NAME,
    Instance,
    Interrupted,
    OutputClosed,
    OutputFailed,
    command,
    complain,
    program,
    say_json,
)

#: Each module here, when imported, adds its commands to the program.
COMMANDS = (deploy, orders, queries, reload, top, upgrade)
#: The exit status after INT or TERM.
INTERRUPTED = 130
#: The programs with shell completion.  A completion script calls its program, which computes the
#: completions.
PROGRAMS = ("SocketProtector", "socketprotector", NAME, "socketprotector-exporter")


@command(short_help="Print the completion script for a shell.")
@click.argument("shell", type=click.Choice(completion_script.SHELLS))
@click.argument("programs", nargs=-1, type=click.Choice(PROGRAMS), metavar="[PROGRAM]...")
def completion(instance: Instance, shell: str, programs: Sequence[str], as_json: bool) -> None:
    """Print a shell's completion script.

    In bash, run: eval "$(socketprotectorctl completion bash)"

    Without PROGRAM, the script is for all four programs.
    """
    _ = instance
    scripts = [completion_script.make(shell, program, each) for each in programs or PROGRAMS]
    script = "\n".join(scripts)
    if as_json:
        say_json({"shell": shell, "script": script})
    else:
        print(script)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.  arguments: if None, sys.argv[1:]."""
    open_missing_standard_streams()
    keep_exit_status()
    if isinstance(sys.stdout, TextIOWrapper):
        # main()'s caller may have replaced a regular file at descriptor 1 by a pipe.  Python still
        # treats sys.stdout as seekable, so reconfigure() tries to seek, which fails on a pipe.
        with suppress(OSError):
            # A worker's output may have characters that the locale's encoding lacks.
            sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # TERM interrupts, as INT does
    try:
        status = program.main(arguments, prog_name=NAME, standalone_mode=False)
        return int(status or 0)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (Interrupted, click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        message = in_one_line(error.format_message())
        context = getattr(error, "ctx", None)
        complain(f"{message}; see {context.command_path if context else NAME} --help")
        return error.exit_code
    except Refusal as error:
        if isinstance(error, OutputFailed):
            discard_output()
        # A usage error may quote a path with a line break: escape the line break.  Other errors may
        # quote a worker's last words, whose line breaks must stay.
        complain(escape(str(error)) if isinstance(error, UsageError) else str(error))
        return error.status
    except MemoryError as error:
        complain(f"cannot answer: {what_failed(error)}")
        return OutputFailed.status
    except (OutputClosed, SystemExit):  # click raises SystemExit if help goes to `| head`
        discard_output()
        return 0
    except OSError as error:  # help, or the version, cannot be written
        discard_output()
        complain(f"cannot write the output: {what_failed(error)}")
        return OutputFailed.status
