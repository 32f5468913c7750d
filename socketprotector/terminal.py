"""What the operator reads: whole lines, escaped, and never a reason to fail.

Nobody may read them any more (a closed terminal, `| head`): the start goes on all the same.
"""

from __future__ import annotations

import os

from . import words

STDOUT, STDERR = 1, 2


def tell(text: str, where: int = STDERR) -> None:
    """Say something that may have several lines."""
    lines = [words.escape(line) for line in f"SocketProtector: {text}".split("\n")]
    try:
        os.write(where, "\n".join([*lines, ""]).encode("utf-8", "backslashreplace"))
    except OSError:
        pass
