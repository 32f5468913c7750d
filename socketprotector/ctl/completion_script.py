"""Makes the scripts by which bash, zsh and fish complete command lines, from click's scripts.

click's scripts do not complete `--name=WORD`.  bash splits words at `:`, so click's script for bash
completes nothing after `--name web:8000`, either.  In fish, click's script ends descriptions at a
comma.  In zsh, an autoloaded script completes nothing at its second call: only the first call has
the context `loadautofunc`; later calls have `shfunc`.  _CHANGES corrects these four faults.
"""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

#: Shell -> parts of click's script, and what replaces each part.  In the scripts, `option` is
#: the beginning of the word to complete if this is an option with `=`, such as `--name=`.
_CHANGES = {
    "bash": {
        "local response\n": """local response type value
    # The line as typed: bash has split COMP_WORDS at = and :.
    local line=${COMP_LINE:0:COMP_POINT}
    local word=${line##*[[:blank:]]} option=
    [[ $word == --*=* ]] && option=${word%%=*}=
    # What bash keeps of the word; a completion replaces only the rest.
    local kept=${word%"${word##*[$COMP_WORDBREAKS]}"}
    [[ $word ]] || line+="''"
""",
        'COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD': 'COMP_WORDS="$line" COMP_CWORD=-1',
        "COMPREPLY+=($value)": 'value=$option$value; COMPREPLY+=("${value#"$kept"}")',
    },
    "zsh": {
        "for type key descr in": "compset -P 1 '--*='\n    for type key descr in",
        "compadd -U": 'compadd -U -i "$IPREFIX"',
        "== loadautofunc": "== (loadautofunc|shfunc)",
    },
    "fish": {
        "for completion in": "set -l option (string match -r '^--[^=]*=' -- (commandline -ct))\n"
        "    for completion in",
        'split "," $completion': 'split -m 1 "," $completion',
        "ies $metadata[2]": 'ies $metadata[2] | string replace -r -- "^" "$option"',
        "path $metadata[2]": 'path $metadata[2] | string replace -r -- "^" "$option"',
        "echo $metadata[2]": 'echo "$option$metadata[2]"',
    },
}
SHELLS = tuple(_CHANGES)


def make(shell: str, program: click.Command, name: str) -> str:
    """Return the script that a shell needs to complete command lines of a program.

    program: the click command that the program runs.  name: the program's name; the script runs it
    to get the completions.
    """
    variable = f"_{name.replace('-', '_')}_COMPLETE".upper()
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    # Call the base class's source(): BashComplete.source() would run bash to check its version.
    script = ShellComplete.source(shell_class(program, {}, name, variable))
    for old, new in _CHANGES[shell].items():
        script = script.replace(old, new)
    return script
