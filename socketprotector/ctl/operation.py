"""Waits for the result of a command up to a deadline, even if the connection is cut."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..model.text import in_units
from .cli import Instance, say, say_json, say_outcome, tell
from .client import Client, Message
from .errors import ConnectionLost, ControlError, NoProtector, TimedOut
from .reload_progress import Awaited, Losses

#: How often to request the status while no event comes; this also finds a stuck protector.
_LOOK_EVERY_S = 1.0
#: How long to look for a protector after a stop: not long, because a guard keeps the socket open.
_GONE_S = 0.2


class Operation:
    """One command that waits: its connection, its deadline and its outcome."""

    client: Client

    def __init__(self, timeout_s: float, as_json: bool, fields: Sequence[str] = ()) -> None:
        """fields: names that --json prints besides the result; a value is null until known."""
        self.outcome: Message = {"result": None, **dict.fromkeys(fields)}
        self.losses: Losses | None = None
        self._as_json = as_json
        self._timeout_s = timeout_s
        self.until = time.monotonic() + timeout_s if timeout_s else math.inf

    def tell(self, step: str) -> None:
        """Print a step to stderr, except with --json."""
        if not self._as_json:
            tell(step)

    def ends(self, result: str, words: str) -> None:
        """Note the result, which --json prints at the end; without --json, print the words now."""
        self.outcome["result"] = result
        if not self._as_json:
            say_outcome(say, words)

    def slice_s(self, waits_for: str) -> float:
        """Return how long to wait for the next event.  Raises TimedOut.

        waits_for: for the error, in words that follow "still waits for".
        """
        left_s = self.until - time.monotonic()
        if left_s <= 0:
            raise TimedOut(f"not within {in_units(self._timeout_s)}: still waits for {waits_for}")
        return min(left_s, _LOOK_EVERY_S)

    def hear(self, timeout_s: float) -> Message | None:
        """Return the next event, or None.  Raises ConnectionLost."""
        event = self.client.event(timeout_s)
        if event is not None and self.losses is not None:
            self.losses.heard(event)
        return event

    def wait(self, awaited: Awaited, *, look: bool = False) -> None:
        """Read events, and the status while no event comes, until `awaited` is complete.

        look: read the status first.  Raises NoProtector, TimedOut.
        """
        while waits_for := awaited.waits_for():
            try:
                if look:
                    look = False
                    awaited.looked(self.client.request("status"))
                    continue
                event = self.hear(self.slice_s(waits_for))
                if event is not None:
                    awaited.heard(event)
                look = event is None or event.get("event") in awaited.heeded
            except ConnectionLost:
                self._again(awaited)
            except NoProtector:  # the protector lives, but does not answer
                self.slice_s(waits_for)
                raise

    def _again(self, awaited: Awaited) -> None:
        """Read the events from before the cut; then connect again, and read the status."""
        with suppress(ConnectionLost):
            while event := self.hear(0.0):
                awaited.heard(event)
        if not awaited.waits_for():
            return
        if awaited.cut and not awaited.stopping:
            self.tell(awaited.cut)
        try:
            status = self.client.again(_GONE_S if awaited.stopping else math.inf)
        except NoProtector:
            self.slice_s(awaited.waits_for())
            raise
        awaited.looked(status)


@contextmanager
def begin(instance: Instance, timeout_s: float, as_json: bool, *fields: str) -> Iterator[Operation]:
    """Connect for an operation.  With --json, print its outcome in any case."""
    made, begun = Operation(timeout_s, as_json, fields), time.monotonic()
    outcome = made.outcome
    try:
        try:
            with instance.client(events=True, until=made.until) as made.client:
                yield made
        except NoProtector as error:
            if error.code == "silent" and time.monotonic() >= made.until:
                raise TimedOut(f"not within {in_units(timeout_s)}: {error}") from error
            raise
    except ControlError as error:
        outcome["reason"] = outcome.get("reason") or str(error).partition("\n")[0]
        outcome["result"] = error.result
        raise
    except KeyboardInterrupt:
        outcome["result"] = "interrupted"
        tell("interrupted: only the wait has ended; the operation continues")
        raise
    finally:
        outcome["waited_s"] = round(time.monotonic() - begun, 3)
        if as_json and outcome["result"] is not None:
            say_outcome(say_json, outcome)
