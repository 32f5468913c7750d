"""The errors of socketprotectorctl, each with its exit status."""

from __future__ import annotations

from ..model.errors import Refusal, UsageError
from ..model.text import escape


class ControlError(Refusal):
    """A request to a protector, or what it asked for, has failed."""

    #: The outcome in one word, as `--json` of reload, upgrade and stop says it.
    result = "lost"


class NoProtector(ControlError):
    """No protector answers at the control socket, or none came back to it.

    code: dead, silent (it does not answer) or no protector (another program does).
    """

    status = 1

    def __init__(self, error: str, code: str = "dead") -> None:
        super().__init__(escape(error))  # one line, whatever a path in it holds
        self.code = code


class ConnectionLost(NoProtector):
    """The connection ended: an upgrade, a crash, a stop.  A command that waits connects again."""


class NewVersionFailed(ControlError):
    """The new version failed; the old version is still serving."""

    status = 3
    result = "failed"


class NotReady(ControlError):
    """It is there, and clients are not to be sent to it."""

    status = 3
    result = "not ready"


class TimedOut(ControlError):
    """The outcome may still come; --timeout is over."""

    status = 4
    result = "timed out"


class RequestRefused(ControlError):
    """The protector answered, and it was no.  code: that of docs/control.md."""

    status = 100
    result = "refused"

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code
        if code == "invalid":  # a number out of range, say: a mistake of the command line
            self.status = UsageError.status
