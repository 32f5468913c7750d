"""completion: the script that a shell reads to complete commands, options, names and numbers."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from .cli import NAME, Instance, command, program, say_json

_VARIABLE = "_SOCKETPROTECTORCTL_COMPLETE"


@command(short_help="Print the script that completes in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(instance: Instance, shell: str, as_json: bool) -> None:
    """Print the script for a shell, as in: eval "$(socketprotectorctl completion bash)"."""
    _ = instance
    found = get_completion_class(shell)
    assert found is not None
    # Not the class's own source(): that of bash runs a bash to look at its version.
    script = ShellComplete.source(found(program, {}, NAME, _VARIABLE))
    if as_json:
        say_json({"shell": shell, "script": script})
    else:
        print(script)
