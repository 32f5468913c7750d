"""What concerns many workers is done a piece at a time, and in between clients are looked after.

Time is counted here, not taken: each start of a worker takes a millisecond of it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector import supervisor
from socketprotector.events import Action, Event, Spawn
from socketprotector.fleet import Fleet
from socketprotector.notify import WATCHDOG
from socketprotector.supervisor import Supervisor

#: What the protector promises.
LONGEST_S = 0.05
SPAWN_S = 0.001


class Away:
    """Effects that take time, and note for how long nobody looked at the clients."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.spawned = 0
        self.looked_at_s = self.fed_at_s = self.now_s
        self.longest_s = self.unfed_s = 0.0
        self.forwarder = SimpleNamespace(look=self.look)

    def monotonic(self) -> float:
        return self.now_s

    def look(self) -> None:
        self.longest_s = max(self.longest_s, self.now_s - self.looked_at_s)
        self.looked_at_s = self.now_s

    def run_if_due(self, timer: object) -> None:
        assert timer == WATCHDOG
        self.unfed_s = max(self.unfed_s, self.now_s - self.fed_at_s)
        self.fed_at_s = self.now_s

    def perform(self, action: Action) -> None:
        if isinstance(action, Spawn):
            self.spawned += 1
            self.now_s += SPAWN_S


def test_while_600_workers_are_started_clients_are_looked_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = Away()
    monkeypatch.setattr(supervisor, "time", away)
    loop = SimpleNamespace(catch=lambda *_: None, run_if_due=away.run_if_due)

    def effects(post: Callable[[Event], None], save: Callable[[], bool]) -> Any:
        return away

    protector = Supervisor(
        Fleet(workers_wanted=600),
        cast("Any", effects),
        cast("Any", SimpleNamespace(save=lambda *_: True)),
        cast("Any", None),
        loop=cast("Any", loop),
        log=cast("Any", SimpleNamespace(write=lambda *_, **__: None)),
        reopen_logs=lambda: None,
        terminal=None,
        outlives_terminal=False,
    )

    protector.launch()
    away.look()

    assert away.spawned == 600
    assert away.longest_s < LONGEST_S
    assert away.unfed_s < LONGEST_S
