"""The commands deploy, rollback and releases.

deploy and releases need a protector with --releases.  Without --releases, rollback can only end a
reload.

`current` is the symbolic link that the protector's option --current names.  The link leads to the
release that a restart starts.
"""

from __future__ import annotations

from typing import Any

import click

from ..model.release import NAME_IS, is_name
from .cli import Instance, command, say, say_json
from .client import Client, Message
from .errors import ConnectionLost, NotRecorded, RequestRefused
from .fields import completions, listed, number_in, text_in
from .operation import Operation, begin
from .reload import OUTCOME, TIMEOUT, WAIT, await_success, read_status_before
from .reload_progress import Awaited

_OUTCOME = (*OUTCOME, "release", "from_release")
#: Field of a release -> words to print before the time in this field.
_TIMES = {"served_at": "succeeded", "failed_at": "failed", "refused_at": "refused"}


def _check_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not is_name(value):
        raise click.BadParameter(f"{value!r}: write {NAME_IS}")
    return value


def _complete(ctx: click.Context, _: click.Parameter, typed: str) -> list[str]:
    """Return the names of releases that begin with the typed text."""
    try:
        found = listed((ctx.obj or Instance()).request("releases"), "releases")
    except Exception:  # an error is shown when the command is run, not while it is typed
        return []
    return completions((text_in(each, "release") for each in found), typed)


_EXPECT = click.option(
    "--expect",
    metavar="NAME",
    callback=_check_name,
    shell_complete=_complete,
    help="Refuse unless release NAME is serving. For a rollback during a reload: refuse unless the "
    "reload starts release NAME.",
)


@command(short_help="Start a release; if it succeeds, make it the current one.")
@click.argument("release", metavar="NAME", callback=_check_name, shell_complete=_complete)
@_EXPECT
@click.option(
    "--force",
    is_flag=True,
    help="Deploy even if the link --current does not lead to the serving release.",
)
@click.option(
    "--if-changed",
    is_flag=True,
    help="Do nothing if the release is serving and unchanged, and the link --current leads to it.",
)
@click.option(
    "--dry-run", is_flag=True, help="Start the release without clients; stop it when it is ready."
)
@WAIT
@TIMEOUT
def deploy(
    instance: Instance,
    release: str,
    expect: str | None,
    force: bool,
    if_changed: bool,
    dry_run: bool,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Start a release from the --releases folder. The release takes over when it is ready.

    The protector's option --current names a symbolic link, which leads to the release that a
    restart starts. When the new release is ready, has settled and has passed all checks,
    SocketProtector moves the link to the new release. If the new release fails, the exit status is
    3, and the link is unchanged. The old release keeps serving; with --reload-order stop-first,
    SocketProtector starts it again. A stop that calls the deploy off also causes exit status 3.

    Exit status 2: nothing was tried. Either the protector has no --releases; or the release that
    --expect names is not serving. Without --dry-run, three more causes are possible: the link does
    not lead to the serving release, and --force is missing; or --current is no symbolic link; or
    the link cannot be locked. 5: the release is serving, but the link or the history is not on disk
    yet. 6: a start, reload, dry run or other deploy is in progress.
    """
    arguments = _without_unset(release=release, expect=expect, force=force, dry_run=dry_run)
    with begin(instance, timeout, as_json, *_OUTCOME) as operation:
        before = read_status_before(operation)
        operation.outcome["release"] = release
        operation.outcome["from_release"] = serving = _releases_in(before).get("serving")
        if if_changed and _is_unchanged(operation.client, before, release, expect):
            operation.outcome["generation"] = before.get("route")
            if wait and not dry_run:
                _await_saved(operation, release)
            operation.finish("unchanged", f"unchanged: release {release} is serving")
            return
        promised = _request_deploy(operation.client, before, release, arguments)
        _await_deploy(operation, before, promised, release, dry_run=dry_run, wait=wait, old=serving)


@command(short_help="End a reload, or go back to the previous release.")
@_EXPECT
@WAIT
@TIMEOUT
def rollback(
    instance: Instance, expect: str | None, wait: bool, timeout: float, as_json: bool
) -> None:
    """End the reload or deploy in progress: the old generation gets all new clients.

    If neither is in progress, deploy the release that served successfully before the serving
    release. Each further rollback goes further back. A rollback skips missing releases, and
    releases that failed or were refused when last tried. If you return from release 3 to 2, later
    rollbacks skip 3.

    During a reload or deploy, --expect is compared with the new release, not the serving release.

    Exit status 2: nothing was tried. Either there is nothing to roll back; or --expect names
    another release; or --current is no symbolic link; or the link cannot be locked. 6: a start, a
    dry run, or a reload that cannot be ended, is in progress.
    """
    arguments = _without_unset(expect=expect)
    with begin(instance, timeout, as_json, *_OUTCOME) as operation:
        before = read_status_before(operation)
        operation.outcome["from_release"] = serving = _releases_in(before).get("serving")
        result = operation.client.request("rollback", **arguments)
        name, number = text_in(result, "release"), number_in(result, "generation")
        if not name:
            # The generation that was called off may have had the route.
            serving_now = [
                number_in(each, "number")
                for each in listed(before, "generations")
                if each.get("phase") == "serving"
            ]
            operation.outcome["from"] = serving_now[0] if serving_now else None
            operation.outcome["generation"] = number
            operation.outcome["release"] = _releases_in(before).get("deploying")
            words = f"rolled back: generation {number} gets no new clients"
            operation.finish("rolled back", words)
            return
        operation.outcome["release"] = name
        operation.tell(f"going back from release {serving} to {name}")
        _await_deploy(operation, before, number, name, dry_run=False, wait=wait, old=serving)


def _without_unset(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are neither False nor None."""
    return {name: value for name, value in arguments.items() if value}


def _releases_in(status: Message) -> Message:
    """Return the field `releases` of a status; an empty object if the field is missing."""
    found = status.get("releases")
    return found if isinstance(found, dict) else {}


def _is_unchanged(client: Client, before: Message, name: str, expect: str | None) -> bool:
    """Return whether the release is serving and unchanged, and `current` leads to it.

    Also returns False if no generation is serving, if a stop or deploy is in progress, or if
    `expect` names another release than `name`.  A reload or `reload --dry-run` counts as a deploy,
    but only once its settings are read: before that, the status does not show its release.
    If the result is False, the caller requests the deploy, and the protector decides.
    """
    if before.get("route") is None or before.get("phase") == "stopping":
        return False
    releases = _releases_in(before)
    found = (releases.get("serving"), releases.get("current"))
    if releases.get("deploying") or expect not in (None, name) or found != (name, name):
        return False
    listing = listed(client.request("releases"), "releases")
    serving = [each for each in listing if each.get("serving") is True]
    return bool(serving) and not any(each.get("changed") for each in serving)


def _request_deploy(client: Client, before: Message, name: str, arguments: dict[str, Any]) -> int:
    """Request a deploy, and return the number of its generation.

    If the connection is cut before the answer, look for the deploy in the status.  If the status
    does not show the deploy, send the request again.
    before: the status before the request.
    """
    if "releases" not in before:
        raise RequestRefused(
            "unmet",
            f"{before.get('name')} has no releases; start it with --releases DIR and --current "
            "PATH to use them",
        )
    try:
        return number_in(client.request("deploy", **arguments), "generation")
    except ConnectionLost:
        client.reconnect()
    after = client.query("status")
    if _shows_deploy(before, after, name, dry_run="dry_run" in arguments):
        return number_in(_releases_in(after), "generation")
    return number_in(client.query("deploy", **arguments), "generation")


def _shows_deploy(before: Message, after: Message, name: str, *, dry_run: bool) -> bool:
    """Return whether a deploy of this release began between two statuses.

    dry_run: True looks for a deploy with --dry-run, False for a deploy without --dry-run.
    """
    earlier, now, last = _releases_in(before), _releases_in(after), after.get("dry_run")
    if now.get("deploying") == name and earlier.get("deploying") != name:
        return dry_run == (isinstance(last, dict) and last.get("result") == "running")
    return not dry_run and now.get("serving") == name and earlier.get("serving") != name


def _await_deploy(
    operation: Operation,
    before: Message,
    promised: int,
    name: str,
    *,
    dry_run: bool,
    wait: bool,
    old: object,
) -> None:
    """Wait for the verdict on a release, and print the outcome.

    After a success without `dry_run`, wait until `current` and the history are on disk, then print.
    before: the status before the request.
    promised: the generation's number in the answer to the request.
    wait: if false, only print that the deploy or dry run was requested.
    old: the release that was serving before, if known.
    """
    if not wait:
        operation.outcome["generation"] = promised
        requested, will = ("dry run requested", "try") if dry_run else ("requested", "run")
        words = f"{requested}: generation {promised} will {will} release {name}"
        operation.finish("requested", f"{words}; see `{'status' if dry_run else 'releases'}`")
        return
    failure = f"release {name} {'is not ready to deploy' if dry_run else 'not deployed'}"
    success = await_success(operation, before, promised, failure, dry_run=dry_run)
    if dry_run:
        operation.finish("passed", f"would deploy release {name}: {success}")
        return
    previous = f" (before: {old})" if old and old != name else ""
    _await_saved(operation, name, previous)
    operation.finish("deployed", f"deployed: release {name}{previous}; {success}")


def _await_saved(operation: Operation, name: str, previous: str = "") -> None:
    """Wait until `current` and the history are on disk.  Raises NotRecorded if writing failed."""
    saved = _CurrentSaved(name, operation.tell)
    operation.wait(saved, status_first=True)
    if saved.error:
        operation.outcome["reason"] = None  # so that begin() sets it to the error's text
        raise NotRecorded(
            f"release {name} is serving{previous}, but {saved.error}; "
            "SocketProtector tries again; see `status`"
        )


class _CurrentSaved(Awaited):
    """Waits until `current` and the history of releases are on disk, or writing has failed."""

    cut_line = "the connection was cut: an upgrade or a crash; connecting again"

    def __init__(self, name: str, tell: Any) -> None:
        super().__init__(tell)
        self._name = name
        self._done = False
        self.error = ""

    def on_status(self, status: Message) -> None:
        super().on_status(status)
        releases = _releases_in(status)
        self.error = text_in(releases, "error") if releases.get("saved") is False else ""
        # Also stop waiting if another release is serving by now: `current` need not lead to our
        # release any more.
        self._done = releases.get("saved") is not False or releases.get("serving") != self._name

    def waits_for(self) -> str:
        return "" if self._done or self.error else "`current` and the history to be on disk"


@command(short_help="List the releases that were tried.")
def releases(instance: Instance, as_json: bool) -> None:
    """List the tried releases, with times, and with reasons of failures.

    The list is in the order of the last try, oldest first. A current or serving release without a
    recorded try comes at the end. A "failed" release was started and did not succeed; a "refused"
    release was not started. A "changed" release succeeded, and later its folder was
    replaced or removed, or its program was replaced, edited or removed. Changes to other files are
    not detected.
    """
    result = instance.request("releases")
    if as_json:
        say_json(result)
        return
    from . import render

    found = listed(result, "releases")
    for each in found:
        marks = [word for word in ("serving", "current", "changed") if each.get(word) is True]
        times = [
            f"{words} {render.time_text(each.get(name))}"
            for name, words in _TIMES.items()
            if isinstance(each.get(name), int | float)
        ]
        reason = text_in(each, "reason")
        line = "  ".join(filter(None, (text_in(each, "release"), ", ".join((*marks, *times)))))
        say(f"{line}: {reason}" if reason else line)
    if not found:
        say("no release has been tried yet")
