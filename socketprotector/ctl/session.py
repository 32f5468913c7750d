"""A longer conversation with a protector: an upgrade or a crash may come in between.

Each of those ends the connection and leaves the socket.  So a session connects again, for as long
as a successor can still be expected, and follows events again if it did.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from .client import ANSWER_S, Client, Message
from .errors import ConnectionLost, NoProtector

#: A guard starts a killed protector within 0.3 s, and later after one that dies all the time.
RETURN_S = 10.0
_TRY_EVERY_S = 0.05


class Session:
    """Requests and events of one control socket, across the ends of its connections."""

    def __init__(self, path: str, *, events: bool = False) -> None:
        """Connect, and follow events if asked to.  Raises NoProtector, RequestRefused."""
        self.path = path
        self._events = events
        self._client = Client(path)
        if events:
            try:
                self._client.request("events")
            except BaseException:
                self._client.close()
                raise

    def ask(self, command: str, **arguments: Any) -> Message:
        """Ask what may be asked twice: when the connection ends before the answer, it is.

        As often as that happens within RETURN_S: a crash may follow an upgrade.
        """
        until = time.monotonic() + RETURN_S
        while True:
            try:
                return self._client.request(command, **arguments)
            except ConnectionLost:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    raise
                self.again(left_s)

    def ask_once(self, command: str, **arguments: Any) -> Message:
        """Ask; raises ConnectionLost when it is unknown whether it was heard."""
        return self._client.request(command, **arguments)

    def event(self, timeout_s: float) -> Message | None:
        """Return the next event, or None.

        Raises ConnectionLost: then connect `again` and look around.
        """
        return self._client.event(timeout_s)

    def again(self, within_s: float | None = None) -> None:
        """Connect again.  Raises NoProtector when none came back in time."""
        self._client.close()
        limit_s = RETURN_S if within_s is None else min(within_s, RETURN_S)
        until = time.monotonic() + limit_s
        while True:
            left_s = until - time.monotonic()
            try:
                self._client = Client(self.path, max(0.1, min(ANSWER_S, left_s)))
                self._client.request("events" if self._events else "status")
                return
            except NoProtector as error:
                self._client.close()
                if left_s <= _TRY_EVERY_S:
                    raise NoProtector(
                        f"the protector did not come back within {limit_s:g} s ({error})"
                    ) from error
            time.sleep(_TRY_EVERY_S)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()
