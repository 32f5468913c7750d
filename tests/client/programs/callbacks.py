"""Registers callbacks for the drain: two fail, and one is registered after the drain has begun."""

from __future__ import annotations

import sys
import threading

from socketprotector_client import on_drain, serve

from tests.client.programs.talk import say, talk


def fail() -> None:
    raise RuntimeError("a callback failed")


def say_where() -> None:
    say(f"in the main thread: {threading.current_thread() is threading.main_thread()}")


on_drain(say_where)
on_drain(fail)
on_drain(sys.exit)
on_drain(lambda: say("the one after it"))
serve(talk, threads=1)
on_drain(lambda: say("at once"))
say("ended")
