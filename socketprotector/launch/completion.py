"""Answers a shell that completes a command line of SocketProtector.

`socketprotectorctl completion` prints the script that calls this module.  The answers come from the
table of options (options.py).
"""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem, get_completion_class

from . import cli
from .resolve import OptionResolver

#: The variable in which the script passes the shell; click chooses this name.
VARIABLE = "_SOCKETPROTECTOR_COMPLETE"


def main(demo: click.Command) -> int:
    """Print completions for the shell that the variable names; return 1 if it is unknown.

    demo: the command that `demo` as the first word runs.
    """
    shell, _, wanted = os.environ[VARIABLE].partition("_")
    found = get_completion_class(shell)
    if found is None or wanted != "complete":
        return 1
    resolver = OptionResolver([], [], None)
    program = found(cli.COMMAND, {"obj": resolver}, "SocketProtector", VARIABLE)
    before, begun = program.get_completion_args()
    if before[:1] == ["demo"]:
        program.cli, program.ctx_args = demo, {}
        items = program.get_completions(before[1:], begun)
    elif "--" in before:  # COMMAND and its arguments
        items = [CompletionItem(begun, type="file")]
    else:
        items = program.get_completions(before, begun)
        if not before and "demo".startswith(begun):
            items.append(CompletionItem("demo", help=demo.get_short_help_str()))
    click.echo("\n".join(map(program.format_completion, items)))
    return 0
