"""A loop whose time only passes when a test says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import Event
from socketprotector.daemon.runtime import Runtime


class Clock:
    """Stands for the loop, the clock, the log and the rest of a Runtime."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[str] = []  # the events of the log
        self.fields: list[dict[str, object]] = []  # of each of these lines
        self.posted: list[Event] = []
        self.saves = 0  # how often the state was written
        self.watched: dict[int, Callable[[], None]] = {}
        self.watched_for: dict[int, int] = {}  # the events that each is watched for
        self.cannot_watch = False
        self.soon, self.soon_ns = False, 0  # as if without --busy-poll
        self._timers: dict[Hashable, tuple[float, Callable[[], None]]] = {}

    def use_in(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> Runtime:
        """Have these modules read this clock; return what they are constructed with."""
        clock = SimpleNamespace(
            monotonic=lambda: self.now,
            monotonic_ns=lambda: int(self.now * 1e9),
            time=lambda: self.now,
        )
        for each in modules:
            patch.setattr(each, "time", clock)
        log = SimpleNamespace(write=self._write, set_level=lambda _: None)
        return Runtime(cast("Any", self), cast("Any", log), self.posted.append, self._save)

    def _write(self, _level: str, event: str, **fields: object) -> None:
        self.lines.append(event)
        self.fields.append(fields)

    def _save(self) -> bool:
        self.saves += 1
        return True

    # -- descriptors ---------------------------------------------------------

    def watch(self, fd: int, callback: Callable[[], None], events: int = 1) -> None:
        if self.cannot_watch:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        assert fd not in self.watched, "epoll_ctl() fails for a descriptor that it has"
        self.watched[fd], self.watched_for[fd] = callback, events

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    # -- timers --------------------------------------------------------------

    def call_after(self, name: Hashable, seconds: float, callback: Callable[[], None]) -> None:
        self._timers[name] = self.now + seconds, callback

    def cancel(self, name: Hashable) -> None:
        self._timers.pop(name, None)

    def due(self, name: Hashable) -> float | None:
        return self._timers[name][0] if name in self._timers else None

    @property
    def waits(self) -> bool:
        return bool(self._timers)

    def pass_time(self, seconds: float) -> None:
        """Call what is due within that time, each at its own instant."""
        end = self.now + seconds
        while due := [(at, name) for name, (at, _) in self._timers.items() if at <= end]:
            at, name = min(due, key=lambda each: each[0])
            _, callback = self._timers.pop(name)
            self.now = max(self.now, at)
            callback()
        self.now = end
