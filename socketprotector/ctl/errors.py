"""The errors of socketprotectorctl, each with its exit status."""

from __future__ import annotations

from ..model.errors import Refusal, UsageError
from ..model.text import escape


class ControlError(Refusal):
    """A request to a protector, or the operation that the request started, has failed."""

    #: The outcome in a word or two; commands that wait print it with `--json`.
    result = "lost"


class NoProtector(ControlError):
    """No protector answers at the control socket, or no protector came back to it.

    code: dead (no process listens), silent (no answer) or no protector (another program answers).
    """

    status = 1

    def __init__(self, error: str, code: str = "dead") -> None:
        super().__init__(escape(error))  # one line, even if a path contains a line break
        self.code = code


class ConnectionLost(NoProtector):
    """An upgrade, crash or stop ended the connection.  A waiting command reconnects."""


class NewVersionFailed(ControlError):
    """The new version failed; the old version is still serving."""

    status = 3
    result = "failed"


class NotReady(ControlError):
    """The protector is running, but load balancers should not send clients to it."""

    status = 3
    result = "not ready"


class TimedOut(ControlError):
    """--timeout has expired; the operation may still succeed."""

    status = 4
    result = "timed out"


class CurrentNotMoved(ControlError):
    """The new version is serving, but `current` or the history is not on disk yet."""

    status = 5
    result = "not recorded"


#: Refusal codes that have their own exit status.  invalid: a mistake in the command line, such as a
#: number out of range.
_STATUSES = {"invalid": UsageError.status, "unmet": UsageError.status, "deploying": 6}


class RequestRefused(ControlError):
    """The protector refused a request.  code: see docs/control.md."""

    status = 100
    result = "refused"

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code
        self.status = _STATUSES.get(code, self.status)
