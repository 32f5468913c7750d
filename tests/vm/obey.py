"""Run inside of the machine what a test outside commands over a serial line: tests/vm/commanded.py.

    python -m tests.vm.obey TTY

In: {"number": N, "words": [...], "text": STDIN}.  Out: {"boot": ID} at first; for each command
{"answer": N, "status": ..., "out": ..., "err": ...}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tty
from pathlib import Path
from typing import Any


def main() -> None:
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)

    def say(**said: Any) -> None:
        left = (json.dumps(said) + "\n").encode()
        while left:
            left = left[os.write(fd, left) :]

    say(boot=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with open(fd, "rb", closefd=False) as lines:
        for line in lines:
            order = json.loads(line)
            done = subprocess.run(
                order["words"],
                input=order["text"],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            say(
                answer=order["number"],
                status=done.returncode,
                out=done.stdout,
                err=done.stderr,
            )


if __name__ == "__main__":
    main()
