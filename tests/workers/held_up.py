"""The command line, held up at a known place: while it checks the env file.

    python held_up.py GATE [the command's own arguments]

It opens GATE (a FIFO) first, which waits for a process at the other end.
"""

import sys

from socketprotector.__main__ import main
from socketprotector.system import env_file

gate = sys.argv.pop(1)
_read = env_file.read


def read(path: str) -> dict[str, str]:
    env_file.read = _read  # once
    with open(gate, "rb") as file:
        file.read()
    return _read(path)


env_file.read = read
main()
