"""reload, stop: commands that take a while, and end in a verdict.

Each sends its request at once and then waits, so that the exit status is the outcome.
Only the protector's own report counts as a success.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import click

from ..model.duration import Duration, Value
from ..model.handoff_modes import MODES
from ..model.share import percent, read_percent
from ..model.text import in_units
from .cli import Instance, answer, command
from .client import Client, Message
from .errors import (
    ConnectionLost,
    ControlError,
    NewVersionFailed,
    NoProtector,
    RequestRefused,
)
from .fields import failing, listed, measure, number_in, text_in
from .operation import Operation, begin
from .reload_progress import (
    OF_STOP,
    Awaited,
    Losses,
    ProgressThrottle,
    Reload,
    Verdict,
    draining,
    tries,
)

#: The fields of `reload --json` besides result and waited_s; null if unknown.
OUTCOME = ("name", "from", "generation", "reason", "last_words", "lost")

WAIT = click.option("--wait/--no-wait", default=True, help="Wait for the outcome, or return.")
_SHARE = Value("SHARE", lambda text: percent(read_percent(text)))
TIMEOUT = click.option(
    "--timeout", default="0", type=Duration(), help="How long to wait; 0: no limit."
)


# -- reload ---------------------------------------------------------------------------


@command(short_help="Start the new version, and report the outcome.")
@WAIT
@click.option("--drained", is_flag=True, help="Wait for the end of the old generations, too.")
@click.option("--dry-run", is_flag=True, help="Start it, stop it when it is ready; no clients.")
@click.option("--canary", type=_SHARE, help="Give it this share of the new clients first: 5%.")
@click.option(
    "--for", "for_s", type=Duration(zero=False), help="How long the canary lasts.  [default: 60s]"
)
@click.option("--at-least", type=click.IntRange(0), help="Connections that the canary must have.")
@TIMEOUT
def reload(
    instance: Instance,
    wait: bool,
    drained: bool,
    dry_run: bool,
    canary: str | None,
    for_s: float | None,
    at_least: int | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Start the new version beside the old one; it takes over when it is ready.

    Waits until the new generation is serving and --settle is over.  If the new generation fails,
    prints the reason and exits with 3; the old one is still serving.

    With --dry-run the new generation is stopped when it is ready, and gets no clients. The exit
    status is that of a reload.

    With --canary the new generation first has a share of the new clients. promote and rollback end
    that time early.
    """
    if dry_run and (drained or canary):
        other = "--canary" if canary else "--drained"
        raise click.UsageError(f"--dry-run does not work with {other}; leave one out")
    how = _how(dry_run, _canary(canary, for_s, at_least))
    if not wait:
        if drained or timeout:
            raise click.UsageError(
                "--no-wait does not work with --drained or --timeout; leave one out"
            )
        generation = number_in(instance.request("reload", **how), "generation")
        words = f"reload requested: generation {generation} will start; see status for the outcome"
        if dry_run:
            words = f"dry run requested: generation {generation} will be tried; see status for the "
            words += "verdict"
        answer(as_json, {"generation": generation, "result": "requested"}, words)
        return
    with begin(instance, timeout, as_json, *OUTCOME) as operation:
        before = begun(operation)
        promised = _request_reload(operation.client, before, how)
        failed = "not ready to reload" if dry_run else "not reloaded"
        found = follow(operation, before, promised, failed, dry_run=dry_run, drained=drained)
        words = f"would reload: {found.words}" if dry_run else f"reloaded: {found.words}"
        operation.ends("passed" if dry_run else "reloaded", words)


@dataclass(frozen=True, slots=True)
class Success:
    """A reload or dry run that has succeeded."""

    words: str
    status: Message  # after it; empty if the protector did not answer


def begun(operation: Operation) -> Message:
    """Return the status before a request, and note it for the outcome."""
    before = operation.client.query("status")
    operation.losses = Losses(before)
    operation.outcome["name"] = before.get("name")
    operation.outcome["from"] = before.get("route")
    return before


def follow(
    operation: Operation,
    before: Message,
    promised: int,
    failed: str,
    *,
    dry_run: bool,
    drained: bool = False,
) -> Success:
    """Wait for the verdict about a requested generation, and for what --drained adds.

    promised: its number.  failed: the beginning of the error if it fails, as NewVersionFailed.
    """
    old = before.get("route")
    operation.outcome["generation"] = promised
    watched = Reload(promised, before, operation.tell, dry_run=dry_run)
    found = _judged(operation, watched)
    operation.outcome["generation"] = found.generation
    serves_still = False
    if dry_run or (drained and found.taken):
        left = (_Tried if dry_run else _Older)(found.generation, watched)
        with _unless_it_ended(lambda: dry_run or left.stopping):
            operation.wait(left, look=True)
            serves_still = not left.stopping
    after_all = _count_losses(operation)
    if not found.taken:
        _raise_failed(operation, found, failed)
    if dry_run:
        still = serves_still and old is not None
        words = f"generation {found.generation} became ready and was stopped"
        words += f"; generation {old} is still serving" if still else ""
        return Success(words, after_all)
    instead = f" in place of generation {old}" if isinstance(old, int) else ""
    why = f", {found.reason}" if found.reason else ""
    gone = "; nothing older is left" if drained else ""
    operation.outcome["reason"] = found.reason or None
    words = f"generation {found.generation} is serving{instead}{why}{gone}"
    return Success(words + _first_programs(after_all, found.generation), after_all)


def _first_programs(status: Message, generation: int) -> str:
    """Return how a generation's first programs ended; "" unless each connection gets a program."""
    mode = MODES.get(text_in(status, "handoff"))
    if mode is None or not mode.pooled:
        return ""
    for each in listed(status, "generations"):
        if each.get("number") == generation:
            if why := failing(each):
                return f"; {why}"
            return "; no program of it has run yet" if each.get("accepted") == 0 else ""
    return ""


def _count_losses(operation: Operation) -> Message:
    """Store how many connections were lost since the reload was requested; return the status."""
    assert operation.losses is not None
    try:
        after = operation.client.request("status")
        while operation.hear(0.0) is not None:  # events from before that answer
            pass
    except ControlError:
        return {}
    operation.outcome["lost"] = operation.losses.count(after)
    return after


def _request_reload(client: Client, before: Message, how: dict[str, Any]) -> int:
    """Request the reload; if the connection ends early, request it again unless it has begun."""
    dry_run = "dry_run" in how
    if dry_run and "dry_run" not in before:
        raise RequestRefused(
            "unknown",
            f"{before.get('name')} runs version {before.get('version')}, which has no dry run; "
            "nothing was tried; install a newer version and run `socketprotectorctl upgrade`",
        )
    try:
        return number_in(client.request("reload", **how), "generation")
    except ConnectionLost:
        client.again()
    newest = max(_tried(before, dry_run=dry_run), default=0)
    for number in _tried(client.query("status"), dry_run=dry_run):
        if number > newest:
            return number
    return number_in(client.query("reload", **how), "generation")


def _canary(share: str | None, for_s: float | None, at_least: int | None) -> dict[str, Any] | None:
    """Return the canary of a request; None: the new generation gets all clients at once."""
    more = {"for_s": for_s, "at_least": at_least}
    given = {name: value for name, value in more.items() if value is not None}
    if share is None and given:
        raise click.UsageError("--for and --at-least need --canary SHARE")
    return {"share": share, **given} if share is not None else None


def _how(dry_run: bool, canary: dict[str, Any] | None) -> dict[str, Any]:
    """Return only the arguments that a reload needs: older protectors refuse any argument."""
    if canary is not None:
        return {"canary": canary}
    return {"dry_run": True} if dry_run else {}


def _tried(status: Message, *, dry_run: bool) -> list[int]:
    return [number_in(each, "generation") for each in tries(status, dry_run=dry_run)]


def _judged(operation: Operation, watched: Reload) -> Verdict:
    try:
        operation.wait(watched)
    except NoProtector as error:
        if error.code != "dead":
            raise
        end = "the protector was stopped" if watched.stopping else str(error)
        serves = "ready" if watched.dry_run else "serving"
        raise NoProtector(
            f"lost sight of generation {watched.generation} before it was {serves}: {end}; "
            "see `status` or the log"
        ) from error
    assert watched.verdict is not None
    return watched.verdict


@contextmanager
def _unless_it_ended(meant: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Ignore the end of the protector if `meant()`: all generations have ended, too."""
    try:
        yield
    except NoProtector as error:
        if error.code != "dead" or not meant():
            raise


class _Older(Awaited):
    """Waits until all generations before the serving one have ended, after a reload."""

    heeded = ("drained", "exited")

    def __init__(self, generation: int, watched: Reload) -> None:
        super().__init__(watched.tell)
        self.stopping = watched.stopping
        self._generation = generation
        self._left = "status"
        self._most, self._shown = 0, ProgressThrottle()

    def looked(self, status: Message) -> None:
        super().looked(status)
        self._left = self._left_in(status)

    def _left_in(self, status: Message) -> str:
        self.waits.looked(status, ("drain", "stop"), self._generation)
        workers, words = draining(status, self._generation)
        self._most = max(self._most, workers)
        step = f"drained {self._most - workers}/{self._most} workers"
        if self._most and self._shown.is_news(workers, step):
            self.tell(step)
        return self.waits.added_to(f"{words} to drain") if words else ""

    def waits_for(self) -> str:
        return self._left


class _Tried(_Older):
    """Waits for the end of the generation that a dry run has started."""

    def _left_in(self, status: Message) -> str:
        there = {number_in(each, "number") for each in listed(status, "generations")}
        return f"generation {self._generation} to end" if self._generation in there else ""


def _raise_failed(operation: Operation, found: Verdict, what: str) -> None:
    """Raise an error with the reason, and the last words of the worker that failed."""
    last_words = found.last_words or _last_words(operation.client, found.generation)
    operation.outcome["reason"] = found.reason or None
    operation.outcome["last_words"] = last_words or None
    text = f"{what}: generation {found.generation} failed"
    if found.reason:
        text += f": {found.reason}"
    try:
        status = operation.client.request("status")
    except ControlError:
        status = {}
    route = status.get("route")
    if isinstance(route, int) and status.get("phase") != "stopping":
        text += f"; generation {route} is still serving"
    raise NewVersionFailed(text + quoted(last_words))


def _last_words(client: Client, generation: int) -> str:
    """Return the last words from `crashes`, because a cut connection may have lost the event."""
    try:
        crashes = listed(client.request("crashes"), "crashes")
    except ControlError:
        return ""
    for each in reversed(crashes):
        if number_in(each, "generation") == generation and text_in(each, "last_words"):
            return text_in(each, "last_words")
    return ""


def quoted(last_words: str) -> str:
    lines = last_words.strip("\n").split("\n") if last_words.strip() else []
    return "".join(f"\n  | {line}" for line in lines)


# -- stop --------------------------------------------------------------------------------


@command(short_help="Stop gracefully, or at once with --quick.")
@WAIT
@click.option("--quick", is_flag=True, help="At once: TERM to the workers, then KILL.")
@TIMEOUT
def stop(instance: Instance, wait: bool, quick: bool, timeout: float, as_json: bool) -> None:
    """Stop: serve the connected clients, let the workers finish, exit."""
    with begin(instance, timeout, as_json) as operation, ExitStack() as opened:
        before = operation.client.query("status")
        # The processes of the protector and its guard: "stopped" means that both are gone.
        pidfds = []
        for each in {number_in(before, "pid"), number_in(before, "main_pid")}:
            try:
                pidfds.append(os.pidfd_open(each))
            except (OSError, OverflowError):  # gone, or in another pid namespace
                continue
            opened.callback(os.close, pidfds[-1])
        _request_stop(operation.client, quick)
        if not wait:
            operation.ends("requested", "stop requested")
            return
        with _unless_it_ended():
            operation.wait(_Stopped(operation.tell))
        for pidfd in pidfds:
            waits_for = "the protector's process to end"
            while not select.select([pidfd], [], [], operation.slice_s(waits_for))[0]:
                pass
        operation.ends("stopped", f"stopped: {before.get('name')}")


def _request_stop(client: Client, quick: bool) -> None:
    """Request the stop only once, because a second request stops at once."""
    try:
        client.request("stop", quick=quick)
    except ConnectionLost:
        try:
            client.again()
            if client.query("status").get("phase") != "stopping":  # the request was lost
                client.request("stop", quick=quick)
        except NoProtector:
            pass  # the protector has ended; the caller waits for its process next


class _Stopped(Awaited):
    """Waits until the protector no longer answers, because it has ended."""

    heeded = ("lame-duck", "drained", "exited", "stopping")
    stopping = True
    _left = "the workers"
    _lame_duck_told = False

    def looked(self, status: Message) -> None:
        self._left = draining(status)[1] or "the protector"
        self.waits.looked(status, OF_STOP)
        seconds = measure(status, "lame_duck_s")
        if seconds is not None and not self._lame_duck_told:
            self.tell(f"lame duck: still serving; the stop begins in {in_units(round(seconds))}")
            self._lame_duck_told = True

    def waits_for(self) -> str:
        return self.waits.added_to(f"{self._left} to finish")
