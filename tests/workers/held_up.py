"""The command line, held up at a known place: while it checks the env file.

    python held_up.py GATE [the command's own arguments]

It opens GATE (a FIFO) first, which waits for a process at the other end.
"""

import sys

from socketprotector.__main__ import main
from socketprotector.system import env_file

gate = sys.argv.pop(1)
_contents = env_file.contents


def contents(path: str) -> bytes:
    env_file.contents = _contents  # once
    with open(gate, "rb") as file:
        file.read()
    return _contents(path)


env_file.contents = contents
main()
