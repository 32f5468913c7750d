"""deploy, rollback, releases: which release serves, and which one a restart would start."""

from __future__ import annotations

from typing import Any

import click

from ..model.release import NAME_IS, is_name
from .cli import Instance, command, say, say_json
from .client import Client, Message
from .errors import ConnectionLost, CurrentNotMoved, RequestRefused
from .fields import listed, number_in, text_in
from .operation import Operation, begin
from .reload import OUTCOME, TIMEOUT, WAIT, begun, follow
from .reload_progress import Awaited

_OUTCOME = (*OUTCOME, "release", "from_release")


def _name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not is_name(value):
        raise click.BadParameter(f"{value!r}: write {NAME_IS}")
    return value


def _complete(ctx: click.Context, _: click.Parameter, typed: str) -> list[str]:
    """Complete a release of the instance that the command line names so far."""
    try:
        found = listed((ctx.obj or Instance()).request("releases"), "releases")
    except Exception:  # an error is shown when the command is run, not while it is typed
        return []
    return [name for each in found if (name := text_in(each, "release")).startswith(typed)]


_EXPECT = click.option(
    "--expect",
    metavar="NAME",
    callback=_name,
    shell_complete=_complete,
    help="Refuse unless this release is serving.",
)


@command(short_help="Start a release, and let current name it once it is proved.")
@click.argument("release", metavar="NAME", callback=_name, shell_complete=_complete)
@_EXPECT
@click.option("--force", is_flag=True, help="Even if current names another than the serving one.")
@click.option("--if-changed", is_flag=True, help="Do nothing if this release is serving.")
@click.option("--dry-run", is_flag=True, help="Start it, stop it when it is ready; no clients.")
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
    """Start a release of the folder --releases; it takes over when it is proved.

    Then, and only then, the link --current names it, so that a restart starts it, too. If it
    fails, the exit status is 3: the old release is serving, and current names it as before.

    Exit status 2: nothing was tried. 5: it is serving, but current could not be moved yet.
    6: another deploy or reload is in progress.
    """
    how = _given(release=release, expect=expect, force=force, dry_run=dry_run)
    with begin(instance, timeout, as_json, *_OUTCOME) as operation:
        before = begun(operation)
        operation.outcome["release"] = release
        operation.outcome["from_release"] = serving = _of_releases(before).get("serving")
        if if_changed and _serves(operation.client, before, release, expect):
            operation.outcome["generation"] = before.get("route")
            operation.ends("unchanged", f"unchanged: release {release} is serving")
            return
        promised = _request(operation.client, before, release, "deploy", how)
        _end(operation, before, promised, release, dry_run=dry_run, wait=wait, old=serving)


@command(short_help="End a reload, or go back to the release before.")
@_EXPECT
@WAIT
@TIMEOUT
def rollback(
    instance: Instance, expect: str | None, wait: bool, timeout: float, as_json: bool
) -> None:
    """End the reload or deploy in progress: the old generation gets all new clients.

    Without one, deploy the release that was proved before the serving one. Each further rollback
    goes further back, and none returns to a release that was left.

    Exit status 2: there is nothing to roll back. --expect names the release that is left.
    """
    how = _given(expect=expect)
    with begin(instance, timeout, as_json, *_OUTCOME) as operation:
        before = begun(operation)
        operation.outcome["from_release"] = serving = _of_releases(before).get("serving")
        result = operation.client.request("rollback", **how)
        name, number = text_in(result, "release"), number_in(result, "generation")
        if not name:
            operation.outcome["generation"] = number
            words = f"rolled back: generation {number} gets no new clients"
            operation.ends("rolled back", words)
            return
        operation.outcome["release"] = name
        operation.tell(f"going back from release {serving} to {name}")
        _end(operation, before, number, name, dry_run=False, wait=wait, old=serving)


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value}


def _of_releases(status: Message) -> Message:
    found = status.get("releases")
    return found if isinstance(found, dict) else {}


def _serves(client: Client, before: Message, name: str, expect: str | None) -> bool:
    """Return whether a release is serving as it was proved, and `current` names it."""
    releases = _of_releases(before)
    if expect not in (None, name) or (releases.get("serving"), releases.get("current")) != (
        name,
        name,
    ):
        return False
    found = [e for e in listed(client.request("releases"), "releases") if e.get("serving") is True]
    return bool(found) and not any(each.get("changed") for each in found)


def _request(client: Client, before: Message, name: str, what: str, how: dict[str, Any]) -> int:
    """Request a deploy; if the connection ends early, request it again unless it has begun."""
    if "releases" not in before:
        raise RequestRefused(
            "unmet",
            f"{before.get('name')} has no releases; start it with --releases DIR and --current "
            "PATH to use them",
        )
    try:
        return number_in(client.request(what, **how), "generation")
    except ConnectionLost:
        client.again()
    now = _of_releases(client.query("status"))
    if now.get("deploying") == name or (
        now.get("serving") == name and _of_releases(before).get("serving") != name
    ):
        return number_in(now, "generation")
    return number_in(client.query(what, **how), "generation")


def _end(
    operation: Operation,
    before: Message,
    promised: int,
    name: str,
    *,
    dry_run: bool,
    wait: bool,
    old: object,
) -> None:
    """Wait for the verdict about a release, and until `current` is on disk; say so."""
    if not wait:
        operation.outcome["generation"] = promised
        words = f"requested: generation {promised} will start release {name}; see releases"
        operation.ends("requested", words)
        return
    failed = f"release {name} is not ready to deploy" if dry_run else f"release {name} not deployed"
    found = follow(operation, before, promised, failed, dry_run=dry_run)
    if dry_run:
        operation.ends("passed", f"would deploy release {name}: {found.words}")
        return
    recorded = _Recorded(name, operation.tell)
    operation.wait(recorded, look=True)
    was = f" (before: {old})" if old and old != name else ""
    if recorded.error:
        raise CurrentNotMoved(
            f"release {name} is serving{was}, but {recorded.error}; it is tried again, see status"
        )
    operation.ends("deployed", f"deployed: release {name}{was}; {found.words}")


class _Recorded(Awaited):
    """Waits until `current` and the history are on disk, or cannot be written."""

    cut = "the connection was cut: an upgrade or a crash; connecting again"

    def __init__(self, name: str, tell: Any) -> None:
        super().__init__(tell)
        self._name = name
        self._done = False
        self.error = ""

    def looked(self, status: Message) -> None:
        super().looked(status)
        releases = _of_releases(status)
        self.error = text_in(releases, "error")
        # Another reload may have begun: then `current` is its matter.
        self._done = releases.get("saved") is not False or releases.get("serving") != self._name

    def waits_for(self) -> str:
        """Return what is missing; "" for an error, too."""
        return "" if self._done or self.error else "current to be on disk"


@command(short_help="List the releases that were tried.")
def releases(instance: Instance, as_json: bool) -> None:
    """List the releases that were tried, the latest last: since when each served, why it failed.

    "changed" means that its folder or its program is not the one that was proved. Changes of other
    files are not seen.
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
            for name, words in (("served_at", "served since"), ("refused_at", "failed"))
            if isinstance(each.get(name), int | float)
        ]
        reason = text_in(each, "reason")
        line = "  ".join(filter(None, (text_in(each, "release"), ", ".join((*marks, *times)))))
        say(f"{line}: {reason}" if reason else line)
    if not found:
        say("no release was tried yet")
