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


def test_each_of_two_questions_about_one_worker_is_answered() -> None:
    timers, heard = Timers(), list[str]()
    runtime: Any = SimpleNamespace(loop=timers, log=None, persist=lambda: None)
    named: Any = {}
    relay = LogRelay("web", "lines", runtime, named, prefixed=False)

    def hear(request: str, words: bytes) -> None:
        heard.append(f"{request} {words!r}")

    for request in ("first", "second"):
        relay.request_last_words(7, partial(hear, request))
    relay.request_last_words(8, partial(hear, "other"))
    timers.run_out()

    assert heard == ["first b''", "second b''", "other b''"]
    assert timers.set == {}
