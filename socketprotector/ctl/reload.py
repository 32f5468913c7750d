"""The commands reload and stop, and what deploy.py and upgrade.py share with them.

Each command waits for the outcome, except with --no-wait, and reports the outcome by its exit
status.  If the outcome of a reload stays unknown, the command fails.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from ..model.duration import Duration, Value
from ..model.handoff_modes import MODES
from ..model.share import percent, read_percent
from ..model.text import in_units
from .cli import Instance, command
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
    STOP_WAITS,
    Awaited,
    Losses,
    ProgressThrottle,
    Reload,
    Verdict,
    attempts_in,
    ending_generations,
)

#: The fields of `reload --json` besides result and waited_s; null if there is no value.
OUTCOME = ("name", "from", "generation", "reason", "last_words", "lost")

WAIT = click.option(
    "--wait/--no-wait", default=True, help="Wait for the outcome, or return at once."
)
_SHARE = Value("SHARE", lambda text: percent(read_percent(text)))
TIMEOUT = click.option(
    "--timeout", default="0", type=Duration(), help="How long to wait; 0: no limit."
)


# -- reload ---------------------------------------------------------------------------


@command(short_help="Start the new version, and report the outcome.")
@WAIT
@click.option("--drained", is_flag=True, help="Also wait for the end of the old generations.")
@click.option(
    "--dry-run", is_flag=True, help="Start the new version without clients; stop it when ready."
)
@click.option(
    "--canary", type=_SHARE, help="First give the new version this share of clients, such as 5%."
)
@click.option(
    "--for", "for_s", type=Duration(zero=False), help="How long the canary lasts.  [default: 60s]"
)
@click.option(
    "--at-least",
    metavar="N",
    type=click.IntRange(0, 1_000_000_000),
    help="With fewer than N connections, the canary lasts twice as long; if still fewer, it fails.",
)
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
    """Start the new version beside the old one, and switch when the new version is ready.

    The command waits until the new generation is serving and --settle is over. If the new
    generation fails, the command prints the reason and exits with 3. The old generation keeps
    serving; with --reload-order stop-first, SocketProtector starts the old version again.

    With --dry-run the new generation gets no clients, and is stopped when it is ready. The exit
    status is 0 if the generation became ready, and 3 if it failed.

    With --canary the new generation first gets a share of the new clients. The commands promote and
    rollback end the canary early.
    """
    if dry_run and (drained or canary):
        other = "--canary" if canary else "--drained"
        raise click.UsageError(f"--dry-run does not work with {other}; leave one out")
    arguments = _request_arguments(dry_run, _canary(canary, for_s, at_least))
    if not wait and (drained or timeout):
        raise click.UsageError("--no-wait does not work with --drained or --timeout; leave one out")
    with begin(instance, timeout, as_json, *OUTCOME) as operation:
        before = read_status_before(operation)
        promised = _request_reload(operation.client, before, arguments)
        if not wait:
            operation.outcome["generation"] = promised
            requested, will = ("dry run", "be tried") if dry_run else ("reload", "start")
            words = f"{requested} requested: generation {promised} will {will}; see `status`"
            operation.finish("requested", words)
            return
        failure = "not ready to reload" if dry_run else "not reloaded"
        success = await_success(
            operation, before, promised, failure, dry_run=dry_run, drained=drained
        )
        words = f"would reload: {success}" if dry_run else f"reloaded: {success}"
        operation.finish("passed" if dry_run else "reloaded", words)


def read_status_before(operation: Operation) -> Message:
    """Return the status.  Call this before the request that starts a new version.

    Sets operation.losses, and the fields `name` and `from` of the outcome.
    """
    before = operation.status_before()
    operation.losses = Losses(before)
    operation.outcome["name"] = before.get("name")
    operation.outcome["from"] = before.get("route")
    return before


def await_success(
    operation: Operation,
    before: Message,
    promised: int,
    failure: str,
    *,
    dry_run: bool,
    drained: bool = False,
) -> str:
    """Wait for the verdict on a generation; return a text about its success.

    before: the status before the request.
    promised: the generation's number in the answer to the request.  The protector may have to start
    the old version again before the new one, for example to serve waiting clients (core/rescue.py).
    Then the old version may get this number, and the new version gets a higher one.
    failure: the first words of the error if the generation fails.
    dry_run: also wait for the end of this generation.
    drained: after a success, also wait for the end of the older generations.
    Raises NewVersionFailed if the generation fails.
    """
    operation.outcome["generation"] = promised
    watched = Reload(promised, before, operation.tell, dry_run=dry_run)
    found = _await_verdict(operation, watched)
    operation.outcome |= {"generation": found.generation, "from": (old := watched.old)}
    protector_stays = False
    if dry_run or (drained and found.succeeded):
        ending = (_DryRunGeneration if dry_run else _OlderGenerations)(found.generation, watched)
        with _end_of_protector_suffices(lambda: dry_run or ending.stopping):
            operation.wait(ending, status_first=True)
            protector_stays = not ending.stopping
    status_after = _count_losses(operation)
    if not found.succeeded:
        _raise_failed(operation, found, failure)
    if dry_run:
        old_serves = protector_stays and old is not None
        words = f"generation {found.generation} became ready and was stopped"
        return words + (f"; generation {old} is still serving" if old_serves else "")
    instead = f" in place of generation {old}" if isinstance(old, int) else ""
    why = f", {found.reason}" if found.reason else ""
    ended = "; all older generations have ended" if drained else ""
    operation.outcome["reason"] = found.reason or None
    words = f"generation {found.generation} is serving{instead}{why}{ended}"
    return words + _first_programs(status_after, found.generation)


def _first_programs(status: Message, generation: int) -> str:
    """Return a note about the programs of a generation under --handoff stdio.

    The note says that the first programs failed (see failing()), or that no program has run yet.
    Returns "" in other cases, and in other modes.
    """
    mode = MODES.get(text_in(status, "handoff"))
    if mode is None or not mode.pooled:
        return ""
    for each in listed(status, "generations"):
        if each.get("number") == generation:
            if why := failing(each):
                return f"; {why}"
            none_yet = f"; generation {generation} has run no program yet"
            return none_yet if each.get("accepted") == 0 else ""
    return ""


def _count_losses(operation: Operation) -> Message:
    """Store in the outcome how many connections were lost; return the present status.

    The status is empty if the protector does not answer.
    """
    assert operation.losses is not None
    try:
        after = operation.client.request("status")
        while operation.next_event(0.0) is not None:
            pass  # next_event() passes each event to operation.losses, which counts the losses
    except ControlError:
        return {}
    operation.outcome["lost"] = operation.losses.count(after)
    return after


def _request_reload(client: Client, before: Message, arguments: dict[str, Any]) -> int:
    """Request a reload or dry run, and return the number of its generation.

    If the connection is cut, request the status.  If a reload has begun since the status `before`,
    our request has arrived; otherwise repeat the request.  Exception: if `before` has the phase
    `reloading` or `waiting`, always repeat the request: a reload that has begun since then may
    belong to an earlier request.
    """
    dry_run = "dry_run" in arguments
    if dry_run and "dry_run" not in before:
        raise RequestRefused(
            "unknown",
            f"{before.get('name')} runs version {before.get('version')}, which has no dry run; "
            "nothing was tried; install a newer version and run `upgrade`",
        )
    try:
        return number_in(client.request("reload", **arguments), "generation")
    except ConnectionLost:
        client.reconnect()
    newest = max(_generations_tried(before, dry_run=dry_run), default=0)
    for number in _generations_tried(client.query("status"), dry_run=dry_run):
        if number > newest and before.get("phase") not in ("reloading", "waiting"):
            return number
    return number_in(client.query("reload", **arguments), "generation")


def _canary(share: str | None, for_s: float | None, at_least: int | None) -> dict[str, Any] | None:
    """Return the argument `canary` of a request; None for a reload without a canary."""
    more = {"for_s": for_s, "at_least": at_least}
    given = {name: value for name, value in more.items() if value is not None}
    if share is None and given:
        raise click.UsageError("--for and --at-least need --canary SHARE")
    return {"share": share, **given} if share is not None else None


def _request_arguments(dry_run: bool, canary: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of the request `reload`.

    A plain reload has no argument, because older protectors refuse all arguments.
    """
    if canary is not None:
        return {"canary": canary}
    return {"dry_run": True} if dry_run else {}


def _generations_tried(status: Message, *, dry_run: bool) -> list[int]:
    """Return the generation numbers of the reloads, or the dry run, that attempts_in() returns."""
    return [number_in(each, "generation") for each in attempts_in(status, dry_run=dry_run)]


def _await_verdict(operation: Operation, watched: Reload) -> Verdict:
    """Wait for the verdict, and return it.  Raises NoProtector if the protector ends first."""
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
def _end_of_protector_suffices(when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Suppress NoProtector in the `with` block if the protector has ended and when() is true.

    The block waits until generations end, or until the protector ends.
    when: called after the protector has ended; True: the block has nothing more to wait for.
    """
    try:
        yield
    except NoProtector as error:
        if error.code != "dead" or not when():
            raise


class _OlderGenerations(Awaited):
    """Waits, after a reload, until all generations older than the new one have ended."""

    refresh_after = ("drained", "exited")

    def __init__(self, generation: int, watched: Reload) -> None:
        super().__init__(watched.tell)
        self.stopping = watched.stopping
        self._generation = generation
        self._missing = "status"  # until the first status has arrived
        self._most_workers, self._throttle = 0, ProgressThrottle()

    def on_status(self, status: Message) -> None:
        super().on_status(status)
        self._missing = self._missing_in(status)

    def _missing_in(self, status: Message) -> str:
        self.waits.on_status(status, ("drain", "stop"), self._generation)
        workers, words = ending_generations(status, self._generation)
        self._most_workers = most = max(self._most_workers, workers)
        step = f"drained {most - workers}/{most} workers"
        if most and self._throttle.should_show(workers, step):
            self.tell(step)
        return self.waits.with_reasons(f"{words} to drain") if words else ""

    def waits_for(self) -> str:
        return self._missing


class _DryRunGeneration(_OlderGenerations):
    """Waits for the end of the generation that a dry run has started."""

    def _missing_in(self, status: Message) -> str:
        numbers = {number_in(each, "number") for each in listed(status, "generations")}
        return f"generation {self._generation} to end" if self._generation in numbers else ""


def _raise_failed(operation: Operation, found: Verdict, failure: str) -> None:
    """Raise NewVersionFailed with the reason and the failed worker's last words.

    failure: the first words of the error.
    """
    last_words = found.last_words or _last_words(operation.client, found.generation)
    operation.outcome["reason"] = found.reason or None
    operation.outcome["last_words"] = last_words or None
    text = f"{failure}: generation {found.generation} failed"
    if found.reason:
        text += f": {found.reason}"
    try:
        status = operation.client.request("status")
    except ControlError:
        status = {}
    route = status.get("route")
    if isinstance(route, int) and status.get("phase") != "stopping":
        still = "still " if route < found.generation else ""  # a rescue generation is newer
        text += f"; generation {route} is {still}serving"
    raise NewVersionFailed(text + quoted(last_words))


def _last_words(client: Client, generation: int) -> str:
    """Return the newest last words of a generation's failed workers; "" if none are known.

    An event reports the last words, too, but events are lost while the connection is cut.
    """
    try:
        crashes = listed(client.request("crashes"), "crashes")
    except ControlError:
        return ""
    for each in reversed(crashes):
        if number_in(each, "generation") == generation and text_in(each, "last_words"):
            return text_in(each, "last_words")
    return ""


def quoted(last_words: str) -> str:
    """Return a worker's last words as indented lines, to be added to a message."""
    lines = last_words.strip("\n").split("\n") if last_words.strip() else []
    return "".join(f"\n  | {line}" for line in lines)


# -- stop --------------------------------------------------------------------------------


@command(short_help="Stop gracefully, or at once with --quick.")
@WAIT
@click.option("--quick", is_flag=True, help="Stop at once: TERM to the workers, then KILL.")
@TIMEOUT
def stop(instance: Instance, wait: bool, quick: bool, timeout: float, as_json: bool) -> None:
    """Stop gracefully: serve the connected clients, let the workers finish, then exit."""
    with begin(instance, timeout, as_json) as operation, ExitStack() as opened:
        before = operation.status_before()
        # Open pidfds of the protector and the guard before the stop: afterwards their pids may
        # belong to other processes.  Leave out the guard if it is in another PID namespace: its pid
        # in the status may belong to another process here.
        pids = {operation.client.protector_pid}
        if operation.client.shares_pids(before):
            pids.add(number_in(before, "main_pid"))
        pidfds = []
        for each in pids:
            try:
                pidfds.append(os.pidfd_open(each))
            except (OSError, OverflowError):  # the process is gone, or in another PID namespace
                continue
            opened.callback(os.close, pidfds[-1])
        _request_stop(operation.client, quick)
        if not wait:
            operation.finish("requested", "stop requested")
            return
        with _end_of_protector_suffices():
            operation.wait(_Stopped(operation.tell))
        for pidfd in pidfds:
            waits_for = "the processes of SocketProtector to end"
            while not select.select([pidfd], [], [], operation.next_wait_s(waits_for))[0]:
                pass
        operation.finish("stopped", f"stopped: {before.get('name')}")


def _request_stop(client: Client, quick: bool) -> None:
    """Request a stop.

    If the connection is cut, repeat the request only if no stop has begun.  A second request would
    end the lame-duck time, or turn a graceful stop into a quick stop.
    """
    try:
        client.request("stop", quick=quick)
    except ConnectionLost:
        try:
            client.reconnect()
            if client.query("status").get("phase") != "stopping":  # the first request was lost
                client.request("stop", quick=quick)
        except NoProtector:
            pass  # the protector has ended


class _Stopped(Awaited):
    """Waits until the protector has ended.

    waits_for() never returns "", so the wait always ends with an exception: for example TimedOut,
    or NoProtector with the code "dead", which means that the protector has ended.
    """

    refresh_after = ("lame-duck", "drained", "exited", "stopping")
    stopping = True
    _unfinished = "the workers"  # what must finish before the stop is done, as text
    _lame_duck_shown = False

    def on_status(self, status: Message) -> None:
        self._unfinished = ending_generations(status)[1] or "the protector"
        self.waits.on_status(status, STOP_WAITS)
        seconds = measure(status, "lame_duck_s")
        if seconds is not None and not self._lame_duck_shown:
            self.tell(f"lame duck: still serving; the stop begins in {in_units(round(seconds))}")
            self._lame_duck_shown = True

    def waits_for(self) -> str:
        return self.waits.with_reasons(f"{self._unfinished} to finish")
