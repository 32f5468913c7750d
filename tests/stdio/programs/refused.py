"""The pool on a system that refuses to start anything while a file is there.

refused.py FILE ERRNO OPTIONS... -- COMMAND...
"""

import os
import sys
from pathlib import Path
from typing import Any

from socketprotector.stdio.__main__ import main

file, number = Path(sys.argv[1]), int(sys.argv[2])
started = os.posix_spawn


def refused(*given: Any, **more: Any) -> int:
    try:
        tries = os.open(file, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return started(*given, **more)
    os.write(tries, b"tried\n")
    os.close(tries)
    raise OSError(number, os.strerror(number))


os.posix_spawn = refused
sys.argv[1:3] = []
main()
