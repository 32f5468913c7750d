"""Clients that come all the time, while something else happens.

On the standard library alone: packages/life.py has nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Steady:
    """Four side by side, each one client after the other; one that is not served is a failure."""

    def __init__(self, ask: Callable[[], object], pause_s: float = 0.0) -> None:
        """ask: is one client; raises OSError or AssertionError where it is not served.

        pause_s: between two of them.
        """
        self.answered = 0
        self.failures: list[str] = []
        self._ask, self._pause_s = ask, pause_s
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._come, daemon=True) for _ in range(4)]

    def _come(self) -> None:
        while not self._over.wait(self._pause_s):
            try:
                self._ask()
                self.answered += 1
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))

    def __enter__(self) -> Steady:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for each in self._threads:
            each.join()
