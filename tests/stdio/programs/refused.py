"""The pool on a system that refuses to start anything while a file is there.

refused.py FILE ERRNO OPTIONS... -- COMMAND...

With WAIT_S in the environment it is tried again after so long, unless a program ends.
"""

import os
import sys
from pathlib import Path
from typing import Any

from socketprotector.programs.stdio import pool
from socketprotector.programs.stdio.__main__ import main

file, number = Path(sys.argv[1]), int(sys.argv[2])
started = os.posix_spawn
pool.FIRST_WAIT_S = float(os.environ.get("WAIT_S", pool.FIRST_WAIT_S))


def refused(*given: Any, **more: Any) -> int:
    try:
        tries = os.open(file, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return started(*given, **more)
    os.write(tries, b"tried\n")
    os.close(tries)
    raise OSError(number, os.strerror(number))


pool.LAST_WAIT_S = max(pool.FIRST_WAIT_S, pool.LAST_WAIT_S)
os.posix_spawn = refused
sys.argv[1:3] = []
main()
