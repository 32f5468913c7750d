"""A loop whose time only passes when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon.runtime import Runtime


class Clock:
    """Stands for the loop, the clock and the log of the modules that it is given to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self._timers: dict[Hashable, tuple[float, Callable[[], None]]] = {}

    def use_in(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> Runtime:
        """Have these modules read this clock; return what they are constructed with."""
        for each in modules:
            patch.setattr(each, "time", SimpleNamespace(monotonic=lambda: self.now))
        log = SimpleNamespace(write=lambda _level, event, **_fields: self.lines.append(event))
        return Runtime(cast("Any", self), cast("Any", log), lambda _: None, bool)

    def call_after(self, name: Hashable, seconds: float, callback: Callable[[], None]) -> None:
        self._timers[name] = self.now + seconds, callback

    def cancel(self, name: Hashable) -> None:
        self._timers.pop(name, None)

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
