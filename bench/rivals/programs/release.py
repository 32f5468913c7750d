"""What this release does, by the file that RELEASE names: a word, and the release's number.

It is read once, at the start.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

#: How long a slow release takes until it serves.
SLOW_S = 1.5


def release() -> tuple[int, str]:
    """Return the status that it answers, and its answer; a broken one ends here."""
    word, number = Path(os.environ["RELEASE"]).read_text(encoding="ascii").split()
    if word == "broken":
        sys.exit("this release is broken")
    if word == "slow":
        time.sleep(SLOW_S)
    return (500, f"{number} fail") if word == "answers-500" else (200, f"{number} pong")
