"""A graceful stop waits once for the clients that a hold has kept out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from socketprotector.daemon import effects
from socketprotector.daemon.effects import Effects

from .clock import Clock


class Stopping:
    """The part of Effects that closes the listeners at a stop."""

    listeners_survive_stop = False
    _route = None
    _close_listeners: Any = Effects._close_listeners
    _late_s: Any = Effects._late_s
    late_clients_s: Any = Effects.late_clients_s

    def __init__(self, patch: pytest.MonkeyPatch, *, late_s: float, stop_timeout_s: float) -> None:
        self.clock = Clock()
        self.closed: list[float] = []
        self.generations: dict[int, object] = {}
        self._loop = self.clock.use_in(patch, effects).loop
        self.delivery = SimpleNamespace(
            late_s=late_s, close_listeners=lambda *_, **__: self.closed.append(self.clock.now)
        )
        policy = SimpleNamespace(stop_timeout_s=stop_timeout_s)
        self.live_settings = SimpleNamespace(settings=SimpleNamespace(policy=policy))

    def stop(self) -> None:
        self._close_listeners(quick=False)


@pytest.mark.parametrize(
    ("late_s", "stop_timeout_s", "waited_s"),
    [
        (60.0, 10.0, 5.0),  # clients may retry for longer than half of it, also after that half
        (2.0, 10.0, 2.0),
        (60.0, 0.0, 60.0),  # a stop has no end
        (0.0, 10.0, 0.0),
    ],
)
def test_workers_keep_the_other_half_of_the_stop_timeout(
    monkeypatch: pytest.MonkeyPatch, late_s: float, stop_timeout_s: float, waited_s: float
) -> None:
    stopping = Stopping(monkeypatch, late_s=late_s, stop_timeout_s=stop_timeout_s)

    stopping.stop()
    stopping.clock.pass_time(100.0)

    assert stopping.closed == [1000.0 + waited_s]


def test_for_how_long_they_are_still_waited_for_is_never_less_than_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping = Stopping(monkeypatch, late_s=5.0, stop_timeout_s=20.0)
    assert stopping.late_clients_s is None

    stopping.stop()
    stopping.clock.pass_time(4.5)
    assert stopping.late_clients_s == 0.5
    stopping.clock.now += 2.0  # the loop is late
    assert stopping.late_clients_s == 0.0

    stopping.clock.pass_time(0.0)
    assert stopping.late_clients_s is None
