"""Each request for a worker's last words is answered, also two before one answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from socketprotector.daemon.relay_client import LogRelay


class Timers:
    """The part of the loop that is used here: timers, which the test lets run out."""

    def __init__(self) -> None:
        self.set: dict[object, Callable[[], None]] = {}

    def call_after(self, key: object, _: float, act: Callable[[], None]) -> None:
        self.set[key] = act

    def cancel(self, key: object) -> None:
        self.set.pop(key, None)

    def run_out(self) -> None:
        for key in [*self.set]:
            self.set.pop(key)()


def made(timers: Timers) -> LogRelay:
    """A relay without a process, so that no request is sent."""
    runtime: Any = SimpleNamespace(loop=timers, log=None, persist=lambda: None)
    named: Any = {}
    return LogRelay("web", "lines", runtime, named, prefixed=False)


def test_each_of_two_questions_about_one_worker_is_answered() -> None:
    timers, heard = Timers(), list[str]()
    relay = made(timers)

    def hear(request: str, words: bytes) -> None:
        heard.append(f"{request} {words!r}")

    for request in ("first", "second"):
        relay.request_last_words(7, partial(hear, request))
    relay.request_last_words(8, partial(hear, "other"))
    timers.run_out()

    assert heard == ["first b''", "second b''", "other b''"]
    assert timers.set == {}


def test_questions_that_a_worker_causes_without_end_are_not_kept() -> None:
    timers, heard = Timers(), list[int]()
    relay = made(timers)

    for number in range(10_000):
        relay.request_last_words(7, lambda _, number=number: heard.append(number))  # type: ignore[misc]
    relay.request_last_words(8, lambda _: heard.append(-1))

    kept = 10_000 - len(heard)
    assert 0 < kept < 1000
    assert len(relay._unsent) == kept + 1
    assert -1 not in heard  # another worker's words are still awaited
    timers.run_out()
    assert sorted(heard) == list(range(-1, 10_000))
