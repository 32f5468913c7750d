"""The errors of socketprotectorctl, each with its exit status."""

from __future__ import annotations

from ..model.errors import Refusal, UsageError
from ..model.text import escape


class ControlError(Refusal):
    """A request to a protector failed, or the command that the request began."""

    #: The outcome in one word, which `--json` of reload, upgrade and stop prints.
    result = "lost"


class NoProtector(ControlError):
    """No protector answers at the control socket, or none came back to it.

    code: dead, silent (it does not answer) or no protector (another program answers).
    """

    status = 1

    def __init__(self, error: str, code: str = "dead") -> None:
        super().__init__(escape(error))  # one line, even if a path contains a line break
        self.code = code


class ConnectionLost(NoProtector):
    """The connection ended by an upgrade, crash or stop.  A waiting command connects again."""


class NewVersionFailed(ControlError):
    """The new version failed; the old version is still serving."""

    status = 3
    result = "failed"


class NotReady(ControlError):
    """The protector is running, but load balancers should not send it clients."""

    status = 3
    result = "not ready"


class TimedOut(ControlError):
    """--timeout is over; the outcome may still come."""

    status = 4
    result = "timed out"


class CurrentNotMoved(ControlError):
    """The new version is serving, but `current` or the history is not on disk yet."""

    status = 5
    result = "not recorded"


#: Codes of refusals with an exit status of their own.  invalid: a mistake in the command line, such
#: as a number out of range.
_STATUSES = {"invalid": UsageError.status, "unmet": UsageError.status, "deploying": 6}


class RequestRefused(ControlError):
    """The protector refused a request.  code: see docs/control.md."""

    status = 100
    result = "refused"

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code
        self.status = _STATUSES.get(code, self.status)
