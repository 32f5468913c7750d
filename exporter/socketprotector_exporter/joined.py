"""Makes an answer once for all clients that wait for it.

However many clients ask, and however slow or large an answer is, it is made once at a time.  A
client that comes meanwhile gets the next one, so none is older than its request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")


class _Run(Future[_T]):
    """The making of one answer; `next` is the one that follows."""

    next: _Run[_T] | None = None


class Joined(Generic[_T]):
    """Answers to clients in several threads, by what they ask for."""

    def __init__(self, make: Callable[[str], _T]) -> None:
        """make: makes the answer; for each key one call at a time."""
        self._make = make
        self._runs: dict[str, _Run[_T]] = {}
        self._alone = threading.Lock()

    def get(self, key: str = "") -> _T:
        """Return an answer that was begun after this call.  Raises what `make` raises."""
        with self._alone:
            before = self._runs.get(key)
            run = before.next if before is not None else None
            if run is None:
                run, leads = _Run[_T](), True
                if before is None:
                    self._runs[key] = run
                else:
                    before.next = run
            else:
                leads = False
        if leads:
            if before is not None:
                before.exception()  # waits for its end
            self._lead(key, run)
        return run.result()

    def _lead(self, key: str, run: _Run[_T]) -> None:
        try:
            result, error = self._make(key), None
        except BaseException as raised:
            result, error = None, raised
        with self._alone:
            if run.next is None:
                del self._runs[key]
            else:
                self._runs[key] = run.next
        if error is None:
            run.set_result(result)  # type: ignore[arg-type]
        else:
            run.set_exception(error)
