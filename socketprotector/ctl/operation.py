"""Waits for the outcome of a command, for up to --timeout; reconnects if the connection ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..model.text import in_units
from .cli import Instance, say, say_json, say_outcome, tell, with_instance
from .client import Client, Message
from .errors import ConnectionLost, ControlError, NoProtector, TimedOut
from .reload_progress import Awaited, Losses

#: How long to wait for an event before requesting the status.  The request also detects a stuck
#: protector, which sends neither events nor answers.
_STATUS_EVERY_S = 1.0
#: Requests that change nothing.  A command that has sent only these requests has not yet begun its
#: operation.
_READ_ONLY = {"events", "status", "releases"}
#: How long to try to reconnect during a stop.  This time is short, because the protector may have
#: ended.  The guard may then still have the socket open, but the guard never answers.
_RECONNECT_IN_STOP_S = 0.2


class Operation:
    """One waiting command: its connection, its deadline and its outcome."""

    client: Client

    def __init__(self, timeout_s: float, as_json: bool, fields: Sequence[str] = ()) -> None:
        """fields: the outcome's fields besides `result`; their values are null until known."""
        self.outcome: Message = {"result": None, **dict.fromkeys(fields)}
        #: Counts clients' lost connections for reload, deploy, rollback; None for other commands.
        self.losses: Losses | None = None
        self._as_json = as_json
        self._timeout_s = timeout_s
        self.until = time.monotonic() + timeout_s if timeout_s else math.inf

    @property
    def is_requested(self) -> bool:
        """Whether the command has begun to send the request that changes something."""
        return hasattr(self, "client") and not self.client.requested <= _READ_ONLY

    def status_before(self) -> Message:
        """Return the status.  Call this before the request that changes something.

        If this protector ends and another one is started, wait() raises NoProtector.
        """
        before = self.client.query("status")
        self.client.started_at = before.get("started_at")
        return before

    def tell(self, step: str) -> None:
        """Print a line of progress to stderr, except with --json."""
        if not self._as_json:
            tell(with_instance(step))

    def finish(self, result: str, words: str) -> None:
        """Set the result, and print the words; with --json, begin() prints the outcome instead."""
        self.outcome["result"] = result
        if not self._as_json:
            say_outcome(say, with_instance(words))

    def next_wait_s(self, waits_for: str) -> float:
        """Return how long to wait for the next event.  Raises TimedOut after the deadline.

        waits_for: what the command waits for, as text for the error.
        """
        left_s = self.until - time.monotonic()
        if left_s <= 0:
            within = in_units(self._timeout_s)
            raise TimedOut(f"not done within {within}: still waiting for {waits_for}")
        return min(left_s, _STATUS_EVERY_S)

    def next_event(self, timeout_s: float) -> Message | None:
        """Return the next event; None if no event arrives in time.  Raises NoProtector."""
        event = self.client.event(timeout_s)
        if event is not None and self.losses is not None:
            self.losses.on_event(event)
        return event

    def wait(self, awaited: Awaited, *, status_first: bool = False) -> None:
        """Pass events and statuses to `awaited` until awaited.waits_for() returns "".

        Requests a status every _STATUS_EVERY_S, even if events come faster, and after each event
        that `awaited.refresh_after` names.
        status_first: whether to request a status before the first wait.
        Raises NoProtector, RequestRefused, TimedOut, and the errors of `awaited`.
        """
        status_at = time.monotonic() + (0.0 if status_first else _STATUS_EVERY_S)
        while waits_for := awaited.waits_for():
            try:
                left_s = status_at - time.monotonic()
                if left_s <= 0:
                    status = self.client.request("status")
                    status_at = time.monotonic() + _STATUS_EVERY_S
                    awaited.on_status(status)
                    continue
                event = self.next_event(min(left_s, self.next_wait_s(waits_for)))
                if event is not None:
                    awaited.on_event(event)
                    if event.get("event") in awaited.refresh_after:
                        status_at = 0.0
            except ConnectionLost:
                self._reconnect(awaited)
                status_at = time.monotonic() + _STATUS_EVERY_S
            except NoProtector:
                self.next_wait_s(waits_for)  # raises TimedOut if the deadline has passed
                raise

    def _reconnect(self, awaited: Awaited) -> None:
        """Reconnect after the connection has ended, and pass the status to `awaited`.

        First process the events that arrived before the connection ended.  If these events
        complete the wait, do not reconnect.
        """
        with suppress(ConnectionLost):
            while event := self.next_event(0.0):
                awaited.on_event(event)
        if not awaited.waits_for():
            return
        if awaited.cut_line and not awaited.stopping:
            self.tell(awaited.cut_line)
        try:
            status = self.client.reconnect(_RECONNECT_IN_STOP_S if awaited.stopping else math.inf)
        except NoProtector:
            self.next_wait_s(awaited.waits_for())  # raises TimedOut if the deadline has passed
            raise
        awaited.on_status(status)


@contextmanager
def begin(instance: Instance, timeout_s: float, as_json: bool, *fields: str) -> Iterator[Operation]:
    """Connect, and yield an Operation; with --json, print the outcome, even after a failure.

    fields: as for Operation.
    """
    operation, begun_s = Operation(timeout_s, as_json, fields), time.monotonic()
    outcome = operation.outcome
    try:
        try:
            with instance.client(events=True, until=operation.until) as operation.client:
                yield operation
        except NoProtector as error:
            if error.code == "silent" and time.monotonic() >= operation.until:
                raise TimedOut(f"not done within {in_units(timeout_s)}: {error}") from error
            raise
    except ControlError as error:
        outcome["reason"] = outcome.get("reason") or str(error).partition("\n")[0]
        outcome["result"] = error.result
        raise
    except KeyboardInterrupt:
        outcome["result"] = "interrupted"
        only_wait = "only the wait has ended; the operation continues"
        tell(f"interrupted: {only_wait if operation.is_requested else 'nothing was requested'}")
        raise
    finally:
        outcome["waited_s"] = round(time.monotonic() - begun_s, 3)
        if as_json and outcome["result"] is not None:
            say_outcome(say_json, outcome)
