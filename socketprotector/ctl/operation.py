"""Wait for the result of an order: up to a deadline, over a connection that may be cut."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..model.text import in_units
from .cli import Instance, say, say_json, say_outcome, tell
from .client import Client, Message
from .errors import ConnectionLost, ControlError, NoProtector, TimedOut
from .reload_progress import Losses

#: How often to request the status while no event comes; this also finds a stuck protector.
_LOOK_EVERY_S = 1.0
#: How long to look for a protector after a stop: a guard keeps the socket while it restarts one.
GONE_S = 0.2


class Operation:
    """One order, its connection, its deadline and its outcome."""

    client: Client

    def __init__(self, timeout_s: float, as_json: bool, fields: Sequence[str] = ()) -> None:
        """fields: of what --json prints, besides the result; null until they are known."""
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
        """Note the result; print the words, except with --json, which prints it at the end."""
        self.outcome["result"] = result
        if not self._as_json:
            say_outcome(say, words)

    def slice_s(self, waits_for: str) -> float:
        """Return how long to wait for the next thing.  Raises TimedOut."""
        left_s = self.until - time.monotonic()
        if left_s <= 0:
            raise TimedOut(f"not within {in_units(self._timeout_s)}: still waits for {waits_for}")
        return min(left_s, _LOOK_EVERY_S)

    def status(self, waits_for: str) -> Message:
        """Return the status.  Raises ConnectionLost, NoProtector, and TimedOut at the deadline."""
        try:
            return self.client.request("status")
        except ConnectionLost:
            raise
        except NoProtector:  # it is there, and does not answer
            self.slice_s(waits_for)
            raise

    def hear(self, timeout_s: float) -> Message | None:
        """Return the next event, or None.  Raises ConnectionLost."""
        event = self.client.event(timeout_s)
        if event is not None and self.losses is not None:
            self.losses.heard(event)
        return event

    def event(self, waits_for: str, *names: str) -> Message | None:
        """Wait for an event of these names.  Raises NoProtector, TimedOut.

        None: none came for a while, or some may have been missed; look into status.
        """
        until = time.monotonic() + self.slice_s(waits_for)
        try:
            while (event := self.hear(max(0.0, until - time.monotonic()))) is not None:
                if event.get("event") in names:
                    return event
        except ConnectionLost:
            self.again(waits_for)
        return None

    def again(self, waits_for: str, *, stopping: bool = False) -> Message:
        """Connect again; return the status.

        Raises NoProtector, or TimedOut if the time was too short for it.
        stopping: it is being stopped, so none is likely to come back.
        """
        try:
            return self.client.again(GONE_S if stopping else math.inf)
        except NoProtector:
            self.slice_s(waits_for)
            raise


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
        tell("interrupted: it goes on; only the waiting has ended")
        raise
    finally:
        outcome["waited_s"] = round(time.monotonic() - begun, 3)
        if as_json and outcome["result"] is not None:
            say_outcome(say_json, outcome)
