"""reload, upgrade, stop: commands that take a while, and end in a verdict.

Each is requested at once and then awaited, so that the exit status says how it ended.
Only what the protector calls a success is one.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..model.duration import Duration
from . import reload_progress
from .cli import Instance, command, say, say_json, tell
from .client import Message
from .errors import ConnectionLost, NewVersionFailed, NoProtector, RequestRefused, TimedOut
from .fields import listed, number_in, text_in
from .reload_progress import Verdict
from .session import Session

#: How often status is asked for while no event comes: this also finds a protector that hangs.
_LOOK_EVERY_S = 1.0
#: A guard keeps the socket while it restarts a protector that died; one that has ended is gone.
_GONE_S = 0.2

_WAIT = click.option("--wait/--no-wait", default=True, help="Wait for the outcome, or return.")
_TIMEOUT = click.option(
    "--timeout", default="0", type=Duration(), help="How long to wait; 0: no limit."
)


class _Deadline:
    """When --timeout is over."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s if timeout_s else math.inf

    def slice_s(self, waits_for: str) -> float:
        """Return how long to wait for the next thing.  Raises TimedOut."""
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimedOut(f"not within {self._timeout_s:g} s: still waits for {waits_for}")
        return min(left_s, _LOOK_EVERY_S)

    def again(self, session: Session, waits_for: str) -> None:
        """Connect again.  Raises NoProtector, or TimedOut if the time was too short for it."""
        try:
            session.again(max(0.1, self._until - time.monotonic()))
        except NoProtector:
            self.slice_s(waits_for)
            raise


@contextmanager
def _outcome(as_json: bool, **known: Any) -> Iterator[Message]:
    """With --json, say the outcome in any case; `result` and `reason` as far as they are known."""
    told: Message = dict(known)
    begun = time.monotonic()
    try:
        yield told
    except (NoProtector, NewVersionFailed, RequestRefused, TimedOut) as error:
        told.setdefault("reason", str(error))
        names = {NewVersionFailed: "failed", RequestRefused: "refused", TimedOut: "timed out"}
        told["result"] = names.get(type(error), "lost")
        raise
    except KeyboardInterrupt:
        told["result"] = "interrupted"
        tell("interrupted: it goes on; only the waiting has ended")
        raise
    finally:
        told["waited_s"] = round(time.monotonic() - begun, 3)
        if as_json and "result" in told:
            say_json(told)


# -- reload ---------------------------------------------------------------------------


@command(short_help="Start the new version, and report the outcome.")
@_WAIT
@click.option("--drained", is_flag=True, help="Wait for the end of the old generations, too.")
@_TIMEOUT
def reload(instance: Instance, wait: bool, drained: bool, timeout: float, as_json: bool) -> None:
    """Start the new version beside the old one; it takes over when it is ready.

    Waits until the new generation serves and --settle is over, or is given up: then the exit
    status is 3, what served before serves on, and the reason is said.
    """
    if not wait and (drained or timeout):
        raise click.UsageError("--no-wait goes with neither --drained nor --timeout")
    if not wait:
        with instance.client() as client:
            generation = number_in(client.request("reload"), "generation")
        if as_json:
            say_json({"generation": generation, "result": "asked"})
        else:
            say(f"reload requested: generation {generation} will start; see status for the outcome")
        return
    deadline = _Deadline(timeout)
    progress = not as_json
    with _outcome(as_json) as told, instance.session(events=True) as session:
        before = session.ask("status")
        told["from"] = before.get("route")
        watched = reload_progress.Reload(_ask_reload(session, before), before)
        told["generation"] = watched.generation
        found = _judged(session, watched, deadline, progress)
        told["generation"] = found.generation
        if not found.taken:
            _given_up(session, found, told)
        if drained:
            _drained(session, found.generation, deadline, progress)
        told["result"] = "reloaded"
        if not as_json:
            old = told["from"]
            after = f", after generation {old}" if isinstance(old, int) else ""
            gone = "; nothing older is left" if drained else ""
            say(f"reloaded: generation {found.generation} serves{after}{gone}")


def _ask_reload(session: Session, before: Message) -> int:
    """Ask for it; where the connection ends before the answer, see whether it was heard."""
    try:
        return number_in(session.ask_once("reload"), "generation")
    except ConnectionLost:
        session.again()
    newest = max((number_in(each, "generation") for each in _reloads(before)), default=0)
    for each in _reloads(session.ask("status")):
        if number_in(each, "generation") > newest:
            return number_in(each, "generation")
    return number_in(session.ask("reload"), "generation")


def _reloads(status: Message) -> list[Message]:
    return listed(status, "reloads")


def _judged(
    session: Session, watched: reload_progress.Reload, deadline: _Deadline, progress: bool
) -> Verdict:
    """Wait for the verdict, and show the way there."""
    while True:
        for step in watched.steps:
            if progress:
                tell(step)
        watched.steps.clear()
        if watched.verdict is not None:
            return watched.verdict
        try:
            event = session.event(deadline.slice_s(watched.waits_for()))
            if event is not None:
                watched.heard(event)
            else:
                watched.looked(session.ask("status"))
        except ConnectionLost:
            _back(session, watched, deadline, progress)
        except NoProtector:  # it is there, and does not answer
            deadline.slice_s(watched.waits_for())
            raise


def _back(
    session: Session, watched: reload_progress.Reload, deadline: _Deadline, progress: bool
) -> None:
    if progress and not watched.stopping:
        tell("the connection was cut: an upgrade or a crash; connecting again")
    try:
        deadline.again(session, watched.waits_for())
        watched.looked(session.ask("status"))
    except NoProtector as error:
        end = "it was stopped" if watched.stopping else str(error)
        raise NoProtector(f"generation {watched.generation} was not seen serving: {end}") from error


def _given_up(session: Session, found: Verdict, told: Message) -> None:
    """Say why, with the last words of the worker that failed."""
    last_words = found.last_words or _last_words(session, found.generation)
    told["reason"] = found.reason or None
    told["last_words"] = last_words or None
    text = f"not reloaded: generation {found.generation} failed"
    if found.reason:
        text += f": {found.reason}"
    try:
        route = session.ask("status").get("route")
    except (NoProtector, RequestRefused):
        route = None
    if isinstance(route, int):
        text += f"; generation {route} serves on"
    raise NewVersionFailed(text + _quoted(last_words))


def _last_words(session: Session, generation: int) -> str:
    """Look for them where a cut connection has lost the event."""
    try:
        crashes = listed(session.ask("crashes"), "crashes")
    except (NoProtector, RequestRefused):
        return ""
    for each in reversed(crashes):
        if number_in(each, "generation") == generation and text_in(each, "last_words"):
            return text_in(each, "last_words")
    return ""


def _quoted(last_words: str) -> str:
    lines = last_words.strip("\n").split("\n") if last_words.strip() else []
    return "".join(f"\n  | {line}" for line in lines)


def _drained(session: Session, generation: int, deadline: _Deadline, progress: bool) -> None:
    """Wait until no generation before this one is left."""
    most, shown = 0, reload_progress.ProgressThrottle()
    left = reload_progress.DrainProgress()
    while True:
        try:
            left = reload_progress.draining(session.ask("status"), generation)
            most = max(most, left.workers)
            step = f"drained {most - left.workers}/{most} workers"
            if progress and most and shown.is_news(left.workers, step):
                tell(step)
            if left.over:
                return
            until = time.monotonic() + deadline.slice_s(f"{left.words()} to drain")
            while (left_s := until - time.monotonic()) > 0:
                event = session.event(left_s)
                if event is not None and event.get("event") in ("drained", "exited"):
                    break
        except ConnectionLost:
            deadline.again(session, f"{left.words()} to drain")


# -- upgrade ---------------------------------------------------------------------------


@command(short_help="Replace the protector's own program in place.")
@_WAIT
@_TIMEOUT
def upgrade(instance: Instance, wait: bool, timeout: float, as_json: bool) -> None:
    """Replace the protector's own program in place: same pid, same workers, nothing closed.

    Waits until the new one serves. Where it cannot take over the exit status is 3, and the old
    one goes on as if nothing had been tried.
    """
    deadline = _Deadline(timeout)
    with _outcome(as_json) as told, instance.session(events=True) as session:
        before = session.ask("status")
        told["from"] = session.ask_once("upgrade").get("from", before.get("version"))
        if not wait:
            told["result"] = "asked"
            if not as_json:
                say("upgrade requested; see status (restarts, version) or the log for the outcome")
            return
        after = _upgraded(session, before, deadline)
        told["version"], told["result"] = after.get("version"), "upgraded"
        if not as_json:
            version = f"{after.get('version')} ({told['from']} before)"
            say(f"upgraded: pid {after.get('pid')} runs {version}")


def _upgraded(session: Session, before: Message, deadline: _Deadline) -> Message:
    """Wait until the new program answers; return its status."""
    waits_for = "the new program to say that it can take over"
    while True:
        try:
            event = session.event(deadline.slice_s(waits_for))
            if event is None:
                status = session.ask("status")
            elif event.get("event") == "upgrade-failed":
                reason = text_in(event, "reason")
                raise NewVersionFailed(
                    f"not upgraded: {before.get('version')} goes on: {reason}"
                    + _quoted(text_in(event, "last_words"))
                )
            elif event.get("event") == "upgraded":
                return session.ask("status")
            else:
                continue
        except ConnectionLost:
            deadline.again(session, waits_for)
            status = session.ask("status")
        if number_in(status, "restarts") > number_in(before, "restarts"):
            return status


# -- stop --------------------------------------------------------------------------------


@command(short_help="Stop gracefully, or at once with --quick.")
@_WAIT
@click.option("--quick", is_flag=True, help="At once: TERM to the workers, then KILL.")
@_TIMEOUT
def stop(instance: Instance, wait: bool, quick: bool, timeout: float, as_json: bool) -> None:
    """Stop: serve those that have connected, let the workers finish, end."""
    deadline = _Deadline(timeout)
    with _outcome(as_json) as told, instance.session(events=True) as session:
        before = session.ask("status")
        process = _Process(before)
        try:
            _ask_stop(session, quick)
            if not wait:
                told["result"] = "asked"
                if not as_json:
                    say("stop requested")
                return
            _stopped(session, process, deadline, progress=not as_json)
        finally:
            process.close()
        told["result"] = "stopped"
        if not as_json:
            say(f"stopped: {before.get('name')}")


def _ask_stop(session: Session, quick: bool) -> None:
    """Ask once: a second time would be heard as "at once"."""
    try:
        session.ask_once("stop", quick=quick)
    except ConnectionLost:
        try:
            session.again()
            if session.ask("status").get("phase") != "stopping":  # it was not heard
                session.ask_once("stop", quick=quick)
        except NoProtector:
            pass  # it has ended; that is looked at next


def _stopped(session: Session, process: _Process, deadline: _Deadline, *, progress: bool) -> None:
    shown, left = reload_progress.ProgressThrottle(), "the workers"
    while True:
        try:
            event = session.event(deadline.slice_s(f"{left} to finish"))
            if event is not None and event.get("event") not in ("drained", "exited", "stopping"):
                continue
            everybody = reload_progress.draining(session.ask_once("status"), 1 << 62)
            left = "the protector" if everybody.over else everybody.words()
            if progress and not everybody.over and shown.is_news(everybody.workers, left):
                tell(f"waits for {left}")
        except ConnectionLost:
            try:
                session.again(_GONE_S)
            except NoProtector:
                process.wait(deadline)
                return


class _Process:
    """The protector's process and its guard's, so that "stopped" means that they are gone."""

    def __init__(self, status: Message) -> None:
        self._pidfds = []
        for each in {number_in(status, "pid"), number_in(status, "main_pid")}:
            try:
                self._pidfds.append(os.pidfd_open(each))
            except (OSError, ValueError):  # gone, or in another pid namespace
                continue

    def wait(self, deadline: _Deadline) -> None:
        """Wait for their end.  Raises TimedOut."""
        for pidfd in self._pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            while not poll.poll(deadline.slice_s("the protector's process to end") * 1000):
                pass

    def close(self) -> None:
        while self._pidfds:
            os.close(self._pidfds.pop())
