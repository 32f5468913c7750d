"""A stop signal to a whole process group reaches a guarded protector twice, and counts once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import Event, StopRequested
from socketprotector.core.fleet import Fleet
from socketprotector.daemon import supervisor
from socketprotector.daemon.event_queue import EventQueue
from socketprotector.daemon.runtime import Runtime


@pytest.mark.parametrize(
    ("guarded", "later_s", "stops"),
    [(True, 0.1, 1), (True, 0.6, 2), (False, 0.1, 2)],
    ids=["by the guard, too", "a second signal", "without a guard"],
)
def test_a_stop_signal_that_the_guard_passes_on_counts_once(
    monkeypatch: pytest.MonkeyPatch, guarded: bool, later_s: float, stops: int
) -> None:
    clock, posted, caught = SimpleNamespace(now=1.0), list[Event](), list[Callable[[int], None]]()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def post(event: Event) -> None:
        posted.append(event)
        clock.now += 2.0  # it takes long to order many workers to finish

    loop = SimpleNamespace(catch=lambda _, signalled: caught.append(signalled))
    log = SimpleNamespace(write=lambda *_, **__: None)
    supervisor.Supervisor(
        Fleet(),
        EventQueue(),
        cast("Any", SimpleNamespace(pool=SimpleNamespace(guarded=guarded))),
        cast("Any", SimpleNamespace(begin=lambda *_: None)),
        cast("Any", None),
        Runtime(cast("Any", loop), cast("Any", log), post, lambda: True),
        reopen_logs=lambda: "",
        on_signal=lambda _: None,
        terminal=None,
        outlives_terminal=False,
    )
    [signalled] = caught

    signalled(signal.SIGTERM)
    clock.now += later_s
    signalled(signal.SIGTERM)

    assert posted == [StopRequested()] * stops
