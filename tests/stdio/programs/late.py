"""The pool on a machine that lets it wait: late.py FILE OPTIONS... -- COMMAND...

While FILE is there, what it is woken for is written there, and it goes on when FILE is gone.
"""

import os
import select
import sys
import time
from pathlib import Path

from socketprotector.programs.stdio.__main__ import main

file = Path(sys.argv[1])
Events = list[tuple[int, int]]


class Late:
    """An epoll set whose owner is slow to run once it was woken."""

    def __init__(self) -> None:
        self._epoll = made()
        self.register, self.unregister = self._epoll.register, self._epoll.unregister

    def poll(self, timeout: float | None) -> Events:
        found = self._epoll.poll(timeout)
        if found and file.exists():
            with os.fdopen(os.open(file, os.O_WRONLY), "w") as woken:
                woken.write("woken")
            while file.exists():
                time.sleep(0.005)
            found = self._epoll.poll(0)
        return found


made = select.epoll
select.epoll = Late  # type: ignore[assignment,misc]
sys.argv[1:2] = []
main()
