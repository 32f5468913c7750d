"""A graceful stop waits once for the clients that a hold has kept out."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from socketprotector.daemon.effects import Effects

from .clock import Clock


def test_workers_keep_the_other_half_of_the_stop_timeout() -> None:
    """Clients may retry for longer than half of it, also after that half."""
    clock, closed = Clock(), list[float]()
    effects = SimpleNamespace(
        listeners_survive_stop=False,
        delivery=SimpleNamespace(close_listeners=lambda *_, **__: closed.append(clock.now)),
        generations={},
        _route=None,
        _loop=clock,
        _late_s=5.0,
    )
    effects._close_listeners = partial(Effects._close_listeners, effects)  # type: ignore[arg-type]

    effects._close_listeners(quick=False)
    clock.pass_time(60.0)

    assert closed == [1005.0]
