"""Refuses --settle, a canary or a rolling reload that could not work, before anything is bound.

In listener mode, a canary and a rolling reload need two sockets for each listener.  A rolling
reload also needs workers that use the client library.  Without the library, a worker that ends may
cut clients that it has accepted, and one worker may be a whole server with many processes.

A command does not show whether it uses the library, so only well-known servers are refused here.
core/workers.py refuses other servers when the first worker is ready without the library's
declaration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ..model import known_servers
from ..model.errors import UsageError
from ..model.ready_kinds import PROBED
from ..model.settings import Settings
from . import server_hints
from .listen_spec import Listen

_ROLLING = "--reload-order rolling"


def refusals(
    settings: Settings, given: Collection[str], listens: Sequence[Listen]
) -> Iterator[tuple[str, str]]:
    """Yield (parameter, reason) for each option that would not work.

    given: the options that were given, without their dashes.
    """
    policy = settings.policy
    for name in ("canary-for", "canary-at-least"):
        if name in given and not policy.canary:
            yield name.replace("-", "_"), f"--{name} needs --canary SHARE"
    for name, is_used in (("settle", policy.settle_s), ("canary", policy.canary)):
        if is_used and name in policy.order.excludes:
            order = policy.order.name
            yield name, f"--{name} does not work with --reload-order {order}; leave one out"
    if "surge" in given and not policy.rolls:
        yield "surge", f"--surge needs {_ROLLING}"
    if policy.rolls:
        for refused in _rolling(settings):
            yield "reload_order", refused
    option = _sharing_option(settings)
    for listen in listens if option else ():
        if why := _why_one_socket(listen):
            yield option, _one_socket(option, listen.text, why)


def _rolling(settings: Settings) -> Iterator[str]:
    """Yield each reason why a rolling reload would not work."""
    if settings.mode.adapter:
        yield (
            f"{_ROLLING} does not work with --handoff {settings.mode.name}, whose workers are only "
            "helper processes; leave it out"
        )
    if not settings.policy.drain_timeout_s:
        yield (
            f"{_ROLLING} needs a limit, because new workers wait for old ones to finish: set "
            "--drain-timeout TIME"
        )
    if settings.policy.workers_accept and settings.ready not in ("notify", *PROBED):
        yield (
            f"{_ROLLING} with --handoff listener needs --ready notify or a probe: other values "
            "ignore READY=1, by which each worker declares that it can finish alone"
        )
    name = known_servers.known(settings.command)
    if settings.policy.workers_accept and name and not server_hints.uses_library(settings):
        yield (
            f"{_ROLLING} with --handoff listener needs workers on the client library, which {name} "
            "does not use; choose start-first"
        )


def _sharing_option(settings: Settings) -> str:
    """Return the option that makes two generations share the clients of a listener's sockets.

    Returns "" if there is no such option, or if the protector accepts the clients.
    """
    policy = settings.policy
    if not policy.workers_accept:
        return ""
    return "canary" if policy.canary else "reload_order" if policy.rolls else ""


def _one_socket(option: str, where: str, why: str) -> str:
    words = _ROLLING if option == "reload_order" else "--canary"
    return (
        f"{words}: all new clients of {where} ({why}) reach one socket, so two generations cannot "
        "share them; leave the option out, or listen on TCP"
    )


def _why_one_socket(listen: Listen) -> str:
    if listen.path is not None:
        return "an abstract name" if listen.path.startswith("@") else "a UNIX path"
    return "?defer_accept" if "defer_accept" in listen.options else ""


def check_siblings(settings: Settings, siblings: Collection[int]) -> None:
    """Refuse a canary or a rolling reload if a listener turned out to have only one socket.

    siblings: the indexes of the listeners with a second socket.
    """
    option = _sharing_option(settings)
    for index, each in enumerate(settings.listeners if option else ()):
        if index not in siblings:
            why = "passed in without ReusePort=yes, or no second socket could be made"
            raise UsageError(_one_socket(option, each.text, why))
