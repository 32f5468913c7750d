"""The command `upgrade`: replaces the protector's running program with the installed program."""

from __future__ import annotations

from collections.abc import Callable

import click

from .cli import Instance, command, say, say_json, say_outcome
from .client import Message
from .errors import NewVersionFailed, NoProtector, RequestRefused
from .fields import number_in, text_in
from .operation import begin
from .reload import TIMEOUT, WAIT, quoted
from .reload_progress import Awaited

#: How long to wait for the answer to `upgrade --check`.  The protector ends a check after 30 s
#: (TRIAL_S of daemon/upgrade.py).
_CHECK_S = 45.0


@command(short_help="Replace the protector's own program in place.")
@WAIT
@click.option(
    "--check", is_flag=True, help="Only check whether the installed program can take over."
)
@TIMEOUT
def upgrade(instance: Instance, wait: bool, check: bool, timeout: float, as_json: bool) -> None:
    """Replace the protector's program with the installed program. Pid and workers stay the same.

    Clients notice nothing. The command waits until the installed program is running. If the
    installed program cannot take over, the exit status is 3, and the old program keeps running. The
    exit status is also 3 if the protector is stopped.

    With --check the installed program only reads a copy of the state, and nothing is replaced.
    """
    if check:
        if timeout or not wait:
            raise click.UsageError("--check takes neither --no-wait nor --timeout")
        _check_upgrade(instance, as_json)
        return
    with begin(instance, timeout, as_json) as operation:
        before = operation.status_before()
        old = operation.client.request("upgrade").get("from", before.get("version"))
        operation.outcome["from"] = old
        if not wait:
            hint = "see `status` (restarts, version) or the log for the outcome"
            operation.finish("requested", f"upgrade requested; {hint}")
            return
        upgraded = _Upgraded(before, operation.tell)
        try:
            operation.wait(upgraded)
        except NoProtector:
            if not upgraded.stopping:
                raise
            raise NewVersionFailed("not upgraded: the protector was stopped") from None
        after = upgraded.status
        new = operation.outcome["version"] = after.get("version")
        operation.finish("upgraded", f"upgraded: pid {after.get('pid')} runs {new} ({old} before)")


def _check_upgrade(instance: Instance, as_json: bool) -> None:
    """Print that the installed program can take over.  Raises NewVersionFailed if it cannot."""
    # The protector disconnects a client that sends no request for 30 s, unless the client follows
    # the events (events=True).  A check can take 30 s.
    with instance.client(_CHECK_S, events=True) as client:
        try:
            result = client.request("upgrade", check=True)
        except RequestRefused as error:
            if error.code != "invalid":
                raise
            raise RequestRefused(
                "unknown", "this protector's version cannot check an upgrade; nothing was tried"
            ) from error
    if as_json:
        say_outcome(say_json, result)
    old, reason = text_in(result, "from"), text_in(result, "reason")
    if reason:
        raise NewVersionFailed(f"{old} cannot be upgraded: {reason}")
    if not as_json:
        say_outcome(say, f"{text_in(result, 'version')} can take over from {old}")


class _Upgraded(Awaited):
    """Waits until `restarts` in the status is higher than before: then the new program runs."""

    def __init__(self, before: Message, tell: Callable[[str], None]) -> None:
        super().__init__(tell)
        self.status = self._before = before

    def on_event(self, event: Message) -> None:
        super().on_event(event)
        if event.get("event") == "upgrade-failed":
            raise NewVersionFailed(
                f"not upgraded: {self._before.get('version')} keeps running: "
                f"{text_in(event, 'reason')}" + quoted(text_in(event, "last_words"))
            )

    def on_status(self, status: Message) -> None:
        super().on_status(status)
        self.status = status
        self.waits.on_status(status, ("upgrade",))

    def waits_for(self) -> str:
        if number_in(self.status, "restarts") > number_in(self._before, "restarts"):
            return ""
        return "the new program to take over"
