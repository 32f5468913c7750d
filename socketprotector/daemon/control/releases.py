"""Carries out `deploy` and `releases`, and the rollback to an earlier release (docs/control.md).

A release is *proved* when its start or reload has succeeded.  It counts as proved even if a stop or
`promote` has ended --settle early.
"""

from __future__ import annotations

from ...core.events import DryRunRequested, ReloadRequested
from ...core.fleet import Fleet, Generation
from ...core.reload import cannot_call_off
from ...model import release
from ...model.control_requests import RequestError
from ..effects import Effects
from ..releases import Releases
from ..runtime import Runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NO_RELEASES = "there are no releases; start with --releases DIR and --current PATH to use them"


def deploy(
    effects: Effects,
    fleet: Fleet,
    runtime: Runtime,
    name: str,
    *,
    expect: str = "",
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Begin the deploy of a release, or its dry run; return the answer.

    expect: the release that must be serving; "": any release.  force: deploy even if the link
    `current` (--current) does not name the serving release.  Raises RequestError.
    """
    releases = _releases_of(effects)
    _refuse_second(fleet, effects)
    _refuse_unexpected(expect, releases.serving)
    if not dry_run:
        _refuse_unmovable(releases)
        named = releases.link.named
        if named != releases.serving and not force:
            what = f"names {named}" if named else "leads to no release"
            raise RequestError(
                "unmet",
                f"{releases.link.path} {what}, but {releases.serving} is serving; see `releases`, "
                "and use --force to move the link",
            )
        runtime.post(ReloadRequested(release=name))
    else:
        runtime.post(DryRunRequested(name))
    return {"generation": fleet.next_generation, "release": name}


def roll_back(effects: Effects, fleet: Fleet, runtime: Runtime, expect: str) -> dict[str, Any]:
    """Begin the deploy of the previous release (Releases.previous()); return the answer.

    expect: the release that must be serving; "": any release.  Raises RequestError.
    """
    releases = effects.live_settings.releases
    if releases is None:
        raise RequestError(
            "unmet", f"nothing to roll back: no reload can be called off, and {_NO_RELEASES}"
        )
    _refuse_second(fleet, effects)
    _refuse_unexpected(expect, releases.serving)
    _refuse_unmovable(releases)
    name = releases.previous()
    if not name:
        raise RequestError(
            "unmet",
            f"nothing to roll back to: no release was proved before {releases.serving}, or "
            "every earlier release has since failed, been refused or lost its folder; see "
            "`releases`",
        )
    runtime.post(ReloadRequested(release=name))
    return {"generation": fleet.next_generation, "release": name, "from": releases.serving}


def refuse_unexpected_incoming(effects: Effects, fleet: Fleet, expect: str) -> None:
    """Raise RequestError if a rollback would call off the reload of an unexpected release.

    expect: the expected release; "": any release.
    """
    _refuse_unexpected(expect, _incoming(effects, fleet)[1])


def listed(effects: Effects) -> list[dict[str, Any]]:
    """Return the releases of the history, the most recently tried release last.

    Also append the release that `current` names, and the serving release, unless the history has
    them.
    """
    releases = _releases_of(effects)
    serving, named = releases.serving, releases.link.named
    found = release.latest(releases.history.value)
    for name in (named, serving):
        if name:
            found.setdefault(name, (None, None))
    return [
        {
            "release": name,
            "serving": name == serving,
            "current": name == named,
            "served_at": _time(proved, release.PROVED),
            "failed_at": _time(rejected, release.FAILED),
            "refused_at": _time(rejected, release.REFUSED),
            "reason": rejected.reason if rejected is not None else None,
            "changed": proved is not None and releases.is_changed(proved),
        }
        for name, (proved, rejected) in found.items()
    ]


def _time(entry: release.Entry | None, outcome: str) -> float | None:
    """Return the time of an entry if it has this outcome; otherwise, or without an entry, None."""
    return entry.at if entry is not None and entry.outcome == outcome else None


def of_status(effects: Effects, fleet: Fleet) -> dict[str, Any]:
    """Return the field `releases` of `status`; an empty result without --releases."""
    releases = effects.live_settings.releases
    if releases is None:
        return {}
    incoming, name = _incoming(effects, fleet)
    route = fleet.route.number if fleet.route else None
    next_or_serving = fleet.next_generation if name else route
    return {
        "releases": {
            "deploying": name or None,
            "generation": incoming.number if incoming else next_or_serving,
            "serving": releases.serving,
            "current": releases.link.named or None,
            "link": releases.link.path,
            "owner": releases.become_owner(),
            "saved": releases.is_saved,
            "error": releases.error or None,
        }
    }


def warnings(effects: Effects) -> tuple[str, ...]:
    """Return the warnings about releases: see Releases.warning and Releases.error."""
    releases = effects.live_settings.releases
    if releases is None:
        return ()
    return tuple(filter(None, (releases.warning, releases.error)))


def _releases_of(effects: Effects) -> Releases:
    if effects.live_settings.releases is None:
        raise RequestError("unmet", _NO_RELEASES)
    return effects.live_settings.releases


def _incoming(effects: Effects, fleet: Fleet) -> tuple[Generation | None, str]:
    """Return the generation and the release of the start, reload, deploy or dry run in progress.

    None: no such generation is open (yet).  "": the release is unknown, or there is none.
    """
    incoming = fleet.incoming if fleet.incoming and fleet.incoming.fresh else None
    opened = effects.generations.get(incoming.number) if incoming else None
    read = effects.live_settings.record.candidate
    unopened = read.release if read else fleet.release
    return incoming, opened.program.release if opened else unopened


def _refuse_second(fleet: Fleet, effects: Effects) -> None:
    """Raise RequestError while a start, reload, deploy or dry run is in progress or queued."""
    if not fleet.is_releasing:
        return
    incoming, name = _incoming(effects, fleet)
    begun = "a reload" if fleet.served else "a start"
    kind = "a dry run" if fleet.dry_run else "a deploy" if fleet.release else begun
    number = incoming.number if incoming else fleet.next_generation
    what = f"{kind} of {name}" if name else kind
    advice = "wait for its end" if cannot_call_off(fleet) else "wait for its end, or `rollback`"
    raise RequestError("deploying", f"{what} is in progress (generation {number}); {advice}")


def _refuse_unexpected(expect: str, found: str) -> None:
    if expect and expect != found:
        raise RequestError(
            "unmet", f"expected release {expect}, but found {found or 'no known release'}"
        )


def _refuse_unmovable(releases: Releases) -> None:
    if not releases.become_owner():
        raise RequestError(
            "unmet",
            releases.link.lock_error
            or f"another protector owns {releases.link.path}; deploy with that protector, then "
            "reload this protector",
        )
    if found := releases.link.in_the_way:
        raise RequestError("unmet", found)
