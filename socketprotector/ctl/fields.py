"""Reads fields of messages, and treats a field of a wrong type as missing.

The peer may be a newer protector, or another program, so any type can arrive.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable
from typing import Any

from ..model.share import percentage_text
from ..model.text import in_units
from ..model.wait_lines import IN_SECONDS, Wait

#: A status, an event, or an object in them; the same type as Message in client.py.
Status = dict[str, Any]
#: The most characters that label() returns: the exporter's metrics need short labels.
_LABEL_CHARACTERS = 200
#: Characters that no shell treats specially, whatever their place in a word.
_SHELL_SAFE = frozenset(string.ascii_letters + string.digits + "@%+:,./_-")


def completions(found: Iterable[str], typed: str) -> list[str]:
    """Return the words that begin with the typed text, for completion in a shell.

    Leaves out words with characters that a shell treats specially: others choose these words.
    """
    return [each for each in found if each.startswith(typed) and not set(each) - _SHELL_SAFE]


def listed(message: Status, name: str) -> list[Status]:
    """Return the objects in a list field; [] if the field is not a list."""
    value = message.get(name)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def number_in(message: Status, name: str) -> int:
    """Return a field's whole number; 0 if the field is not a whole number."""
    value = message.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def text_in(message: Status, name: str) -> str:
    """Return a field's text; "" if the field is not a text."""
    value = message.get(name)
    return value if isinstance(value, str) else ""


def measure(message: Status, name: str) -> float | None:
    """Return a field's number if it is finite and not negative, otherwise None.

    The exporter leaves out a metric that is None, because 0 would be a wrong value.
    """
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def is_lame_duck(status: Status) -> bool:
    """Return True if a protector is a lame duck: it serves, but reports "not ready"."""
    return status.get("lame_duck") in ("on", "stopping")


def serves(status: Status) -> bool:
    """Return True if a generation gets new connections, or will get them after a hold."""
    is_stopping = text_in(status, "phase") == "stopping" and not is_lame_duck(status)
    return measure(status, "route") is not None and not is_stopping


def why_not_ready(status: Status) -> str:
    """Return why a protector is not ready for a load balancer's clients; "" if it is ready.

    A protector on hold counts as ready.  Otherwise a hold on all hosts would leave the load
    balancer without a host.
    """
    if is_lame_duck(status):
        return "lame duck"
    if not serves(status):
        return text_in(status, "phase") or "no generation is serving"
    listeners = listed(status, "listeners")
    cut_off = listeners and all(each.get("reachable") is False for each in listeners)
    return "no client can connect; see the warnings of `status`" if cut_off else ""


def valid_dry_run(status: Status) -> Status | None:
    """Return the last dry run; None if it has not ended, or if a reload has begun after it."""
    dry_run = status.get("dry_run")
    if not isinstance(dry_run, dict) or label(dry_run, "result") not in ("passed", "failed"):
        return None
    begun = max((number_in(each, "generation") for each in listed(status, "reloads")), default=0)
    return dry_run if number_in(dry_run, "generation") > begun else None


def unhealthy(status: Status) -> str | None:
    """Return why a protector is unhealthy; None if it is healthy or its health is unknown."""
    health = status.get("health")
    if not isinstance(health, dict) or health.get("state") != "unhealthy":
        return None
    return text_in(health, "reason") or text_in(health, "last")


def waits_of(status: Status) -> list[Wait]:
    """Return what a protector waits for, in the order of the status."""
    return [
        Wait(
            text_in(each, "kind"),
            number_in(each, "generation"),
            text_in(each, "reason"),
            measure(each, "left_s"),
        )
        for each in listed(status, "waits_for")
    ]


#: Kinds of waits that rollout_text() describes.
_ROLLOUT_KINDS = ("canary", "rolling", "settle")
#: A rolling reload can wait for many workers; rollout_text() names at most this number.
_NAMED = 3


def rollout_of(status: Status) -> Status | None:
    """Return the rollout in a status; None if there is no rollout."""
    found = status.get("rollout")
    return found if isinstance(found, dict) else None


def share_of(status: Status, generation: int) -> float | None:
    """Return the percentage of new connections that a generation gets.

    Returns None if there is no rollout, or if the rollout has no field `share`.
    """
    rollout = rollout_of(status)
    share = measure(rollout, "share") if rollout is not None else None
    if rollout is None or share is None:
        return None
    if generation == number_in(rollout, "generation"):
        return share
    return 100 - share if generation == status.get("route") else 0.0


def rollout_text(status: Status) -> str:
    """Return a text about the progress of a rollout, and, if known, when its current stage ends.

    Returns "" if there is no rollout, or while the new generation starts.
    """
    rollout = rollout_of(status)
    stage = text_in(rollout, "stage") if rollout is not None else "starting"
    if rollout is None or stage == "starting":
        return ""  # the field `waits_for` of the status describes the start
    if text_in(rollout, "kind") == "rolling":
        return _rolling_text(rollout, stage)
    share = f"{percentage_text(measure(rollout, 'share') or 0.0)} of" if stage == "share" else "all"
    words = f"generation {number_in(rollout, 'generation')} gets {share} new connections"
    met, least = measure(rollout, "met"), number_in(rollout, "at_least")
    too_few = stage == "share" and met is not None and met < least
    if met is not None:
        words += f" ({met:,.0f}{f' of at least {least:,}' if too_few else ''} so far)"
    when = _stage_end(rollout)
    if stage == "share" and not too_few:
        return f"{words}; it gets all {when}"
    return f"{words}; {'the count is checked' if too_few else 'the reload ends'} {when}"


def closing_text(generation: Status) -> str:
    """Return how fast a generation closes its connections, and the time left.

    Returns "" if the generation does not close its connections evenly (docs/long-lived.md).
    """
    closing = generation.get("closing")
    rate = measure(closing, "per_s") if isinstance(closing, dict) else None
    left_s = measure(closing, "left_s") if isinstance(closing, dict) else None
    if rate is None or left_s is None:
        return ""
    speed = (
        f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.0f}/min"
    )
    left = f"{math.ceil(left_s)} s" if left_s < IN_SECONDS else f"{math.ceil(left_s / 60)} min"
    return f"closing {speed}, {left} left"


def _stage_end(rollout: Status) -> str:
    """Return when the current stage of a rollout ends, such as `in 41s`."""
    left_s = measure(rollout, "left_s")
    if left_s is None:
        return "after the next good --settle-check"
    return f"in {in_units(math.ceil(left_s))}"


def _rolling_text(rollout: Status, stage: str) -> str:
    replaced, wanted = number_in(rollout, "replaced"), number_in(rollout, "wanted")
    words = f"{replaced:,} of {wanted:,} {'worker' if wanted == 1 else 'workers'} replaced"
    if stage == "settling":
        return f"{words}; the reload continues {_stage_end(rollout)}"
    awaited = listed(rollout, "waits_for")
    if not awaited:
        return words
    named = ", ".join(map(_awaited, awaited[:_NAMED]))
    more = len(awaited) - _NAMED
    return f"{words}, waiting for {named}{f' and {more:,} more' if more > 0 else ''}"


def _awaited(worker: Status) -> str:
    """Return the number and connections of a worker that a rolling reload waits for, as text."""
    name, active = f"worker {number_in(worker, 'worker')}", measure(worker, "active")
    if active is None:
        return name
    if not active:
        return f"{name} (no connection)"
    oldest_s = measure(worker, "oldest_s")
    longest = f", longest {in_units(int(oldest_s))}" if oldest_s is not None else ""
    return f"{name} ({active:,.0f} {'connection' if active == 1 else 'connections'}{longest})"


def other_waits_of(status: Status) -> list[Wait]:
    """Return what a protector waits for, without the waits that rollout_text() describes."""
    described = _ROLLOUT_KINDS if rollout_text(status) else ()
    return [each for each in waits_of(status) if each.kind not in described]


def failing(generation: Status) -> str:
    """Return why a generation's first programs failed, and the last line that they printed.

    Under --handoff stdio, a program works if it ends with status 0, sends something or runs for
    10 s (docs/stdio.md).  A generation's first programs are those that start before any works.
    Returns "" if none of the first programs failed, once a program works, and in other modes.
    """
    found = generation.get("first_programs")
    if not isinstance(found, dict):
        return ""
    lines = text_in(found, "last_words").strip().splitlines()
    return ": ".join([text_in(found, "reason"), *lines[-1:]])


def label(message: Status, name: str) -> str | None:
    """Return a field's text, cut to _LABEL_CHARACTERS; None if the field is not a text."""
    value = message.get(name)
    return value[:_LABEL_CHARACTERS] if isinstance(value, str) else None
