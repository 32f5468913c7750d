"""Answers that are made once for all waiting clients.

Whatever the number of clients, only one answer is made at a time.  A client that comes while an
answer is made gets the next one, so no answer is older than its request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")


class _Run(Future[_T]):
    """One answer under construction; `next` is the following answer."""

    next: _Run[_T] | None = None


class Joined(Generic[_T]):
    """The shared answers to clients in several threads, by key."""

    def __init__(self, make: Callable[[str], _T]) -> None:
        """Make answers by `make(key)`, with one call at a time for each key."""
        self._make = make
        self._runs: dict[str, _Run[_T]] = {}
        self._alone = threading.Lock()

    def get(self, key: str = "") -> _T:
        """Return an answer that was begun after this call.  Raises the errors of `make`."""
        with self._alone:
            before = self._runs.get(key)
            run = before.next if before is not None else None
            if run is None:
                run, is_maker = _Run[_T](), True
                if before is None:
                    self._runs[key] = run
                else:
                    before.next = run
            else:
                is_maker = False
        if is_maker:
            if before is not None:
                before.exception()  # waits for its end
            self._make_answer(key, run)
        return run.result()

    def _make_answer(self, key: str, run: _Run[_T]) -> None:
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
