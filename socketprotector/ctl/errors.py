"""The errors of socketprotectorctl, each with its exit status."""

from __future__ import annotations

from ..model.errors import Refusal, UsageError

__all__ = [
    "ConnectionLost",
    "NewVersionFailed",
    "NoProtector",
    "PermissionDenied",
    "RequestRefused",
    "TimedOut",
    "UsageError",
]


class NoProtector(Refusal):
    """No protector answers at the control socket, or none came back to it."""

    status = 1


class ConnectionLost(NoProtector):
    """The connection ended: an upgrade, a crash, a stop.  A command that waits connects again."""


class NewVersionFailed(Refusal):
    """The new version was tried and given up; what served before serves on."""

    status = 3


class TimedOut(Refusal):
    """What was asked for may still come; it was not waited for any longer."""

    status = 4


class RequestRefused(Refusal):
    """The protector answered, and it was no."""

    status = 100

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code
        if code == "invalid":  # a number out of range, say: a mistake of the command line
            self.status = UsageError.status


class PermissionDenied(RequestRefused):
    """The protector, or the socket's mode, does not let this user ask."""

    def __init__(self, error: str) -> None:
        super().__init__("denied", error)
