"""The errors of socketprotectorctl, each with its exit status."""

from __future__ import annotations

from ..model.errors import Refusal, UsageError
from ..model.text import escape


class ControlError(Refusal):
    """A request to a protector, or the operation that the request started, has failed."""

    #: The field `result` of the outcome that a waiting command prints with --json.
    #: "lost": no protector answers.  If the operation was requested, its result is unknown.
    result = "lost"


class NoProtector(ControlError):
    """No protector answers at the control socket, or the connection to the protector has ended.

    code: "silent": no answer came in time.  "no protector": another program answers.  "dead": no
    process listens, the connection ended, or any other failure.
    """

    status = 1

    def __init__(self, error: str, code: str = "dead") -> None:
        super().__init__(escape(error))  # one line, even if a path contains a line break
        self.code = code


class ConnectionLost(NoProtector):
    """The connection ended, usually by an upgrade, crash or stop; a waiting command reconnects."""


class NewVersionFailed(ControlError):
    """A reload, deploy or upgrade failed, or would fail (diff, --check, --dry-run)."""

    status = 3
    result = "failed"


class NotReady(ControlError):
    """The protector is running, but load balancers should not send clients to it."""

    status = 3
    result = "not ready"


class TimedOut(ControlError):
    """--timeout has expired.

    If the operation was already requested, it continues, and may still succeed.
    """

    status = 4
    result = "timed out"


class NotRecorded(ControlError):
    """The new release is serving, but the link --current or the history is not on disk yet."""

    status = 5
    result = "not recorded"


#: Code of a refusal (docs/control.md) -> exit status, if it differs from RequestRefused.status.
#: invalid: a mistake in the command line, such as a number out of range.
#: unmet: a condition of deploy, rollback or releases is not met.
#: deploying: a start, reload, dry run or other deploy is in progress.
_STATUSES = {"invalid": UsageError.status, "unmet": UsageError.status, "deploying": 6}


class RequestRefused(ControlError):
    """The protector or this program refuses a request, or this user has no permission.

    code: a code of docs/control.md.
    """

    status = 100
    result = "refused"

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code
        self.status = _STATUSES.get(code, self.status)
