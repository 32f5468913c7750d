"""Refuses --drain-spread and --stop-spread where they could not work, before anything is bound.

A command does not show whether it uses the Python client library, so only well-known servers are
refused here.  For other servers, daemon/spread.py warns once their workers are ready.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..model import known_servers
from ..model.settings import Settings
from ..model.text import in_units
from . import server_hints


def refusals(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (parameter, reason) for each option that would not work."""
    policy = settings.policy
    drain, stop = policy.drain_spread_s, policy.stop_spread_s
    if drain and 0 < policy.drain_limit_s < drain:
        yield "drain_spread", _longer("drain", drain, policy.drain_limit_s)
    if stop > policy.stop_timeout_s:
        yield "stop_spread", _longer("stop", stop, policy.stop_timeout_s)
    name = known_servers.known(settings.command)
    if name is None or server_hints.uses_library(settings):
        return
    for option, seconds in (("drain_spread", drain), ("stop_spread", stop)):
        if seconds:
            written = f"--{option.replace('_', '-')}"
            advice = known_servers.ends_connections_by(name)
            yield (
                option,
                f"{written} needs workers on the Python client library, which {name} does not use; "
                f"{advice or f'{name} has no such option of its own: leave {written} out'}",
            )


def _longer(what: str, seconds: float, limit_s: float) -> str:
    return (
        f"--{what}-spread {in_units(seconds)} is longer than --{what}-timeout "
        f"({in_units(limit_s)}), which ends the workers; raise the timeout, or lower the spread"
    )
