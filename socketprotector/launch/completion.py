"""Completes command lines of SocketProtector in a shell.

`socketprotectorctl completion` prints the script that calls this module.  The completions come from
the table of options (options.py).
"""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem, get_completion_class

from . import cli
from .resolve import OptionResolver

#: The variable in which the script names the shell; click prescribes the variable's name.
VARIABLE = "_SOCKETPROTECTOR_COMPLETE"


def main(demo: click.Command) -> int:
    """Print completions for the shell in VARIABLE; return 1 if the shell is unknown.

    demo: the command that runs if the first word is `demo`.
    """
    shell, _, wanted = os.environ[VARIABLE].partition("_")
    found = get_completion_class(shell)
    if found is None or wanted != "complete":
        return 1
    resolver = OptionResolver([], [], None)
    program = found(cli.COMMAND, {"obj": resolver}, "SocketProtector", VARIABLE)
    before, typed = program.get_completion_args()
    if before[:1] == ["demo"]:
        program.cli, program.ctx_args = demo, {}
        items = program.get_completions(before[1:], typed)
    elif "--" in before:  # COMMAND and its arguments
        items = [CompletionItem(typed, type="file")]
    else:
        items = program.get_completions(before, typed)
        if not before and "demo".startswith(typed):
            items.append(CompletionItem("demo", help=demo.get_short_help_str()))
    click.echo("\n".join(map(program.format_completion, items)))
    return 0
