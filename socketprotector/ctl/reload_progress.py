"""Derives the verdict of a reload or dry run from the events and statuses that are passed in.

Events report each step at once, but events are lost while the connection is cut.  A status reports
the same facts later.

The answer to a `reload` request has the number N for the new generation.  But the protector may
have to start the old version again first, for example to serve waiting clients (core/rescue.py).
Then the old version may get N, and the new generation gets a higher number.  When the old version
serves again, its event is `recovered`, which is no verdict.  So the class Reload takes the first
verdict on generation N or a later generation (docs/control.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from ..model.text import headline
from ..model.wait_lines import WaitLines
from .cli import plural
from .client import Message
from .fields import listed, measure, number_in, text_in, waits_of

#: The phases of ending generations.
ENDING = ("draining", "abandoned")
_STARTING = ("starting", "settling")
#: Event that reports a verdict -> whether the verdict is a success.
_VERDICTS = {"reloaded": True, "reload-failed": False}
_DRY_RUN_VERDICTS = {"dry-run-passed": True, "dry-run-failed": False}
#: The results of a reload or dry run, in a status, that mean success.
_SUCCESSES = ("reloaded", "passed")
#: The kinds of waits (Wait.kind in model/wait_lines.py) that delay the verdict of a reload.
_RELOAD_WAITS = (
    *("upgrade", "configuration", "start", "canary", "settle", "rolling", "back-off", "room"),
    "earlier-reload",
)
#: The kinds of waits to show during a stop.
STOP_WAITS = ("stop",)
#: With many workers, we show only about this many counts of ready or drained workers.
_STEPS = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a reload or dry run."""

    succeeded: bool
    generation: int
    reason: str = ""
    last_words: str = ""


@dataclass(slots=True)
class ProgressThrottle:
    """Decides which counts of ready or drained workers to show: about _STEPS of them."""

    _total: int = 0
    _last: object = None

    def should_show(self, remaining: int, words: str) -> bool:
        """Return whether the caller should show this text; if so, note it as shown.

        remaining: how many workers are not ready, or not drained, yet.  words: the text.
        """
        self._total = max(self._total, remaining)
        step = words if self._total <= _STEPS else -(-remaining * _STEPS // self._total)
        before, self._last = self._last, step
        return step != before


class WaitsShown(WaitLines):
    """Shows the waits in a status as lines of progress."""

    def on_status(self, status: Message, kinds: Collection[str], before: float = math.inf) -> None:
        """Show the waits of these kinds for generations with a number below `before`."""
        found = [e for e in waits_of(status) if e.kind in kinds and e.generation < before]
        self.show(found, measure(status, "now") or 0.0)

    def with_reasons(self, words: str) -> str:
        """Return these words, followed by the reasons of the current waits."""
        return ": ".join(filter(None, (words, "; ".join(each.reason for each in self.current))))


@dataclass(slots=True)
class _Progress:
    """What has been shown of a starting generation's progress."""

    number: int  # the generation's number
    ready: set[int] = field(default_factory=set)  # the numbers of the ready workers
    throttle: ProgressThrottle = field(default_factory=ProgressThrottle)
    switch_shown: bool = False  # whether we showed that the generation gets all new connections
    share_shown: bool = False  # whether we showed that the generation gets a share


class Awaited:
    """What a command waits for.  Operation.wait() passes events and statuses to this object."""

    #: Names of events after which the command requests the status at once.
    refresh_after: tuple[str, ...] = ()
    #: The line to show when the connection is cut, except during a stop; "": none.
    cut_line = ""
    #: Whether a stop of the protector has begun.
    stopping = False

    def __init__(self, tell: Callable[[str], None]) -> None:
        """tell: prints a line of progress."""
        self.tell = tell
        self.waits = WaitsShown(tell)

    def on_event(self, event: Message) -> None:
        """Process an event."""
        if event.get("event") == "stopping":
            self._note_stop()

    def on_status(self, status: Message) -> None:
        """Process a status."""
        if status.get("phase") == "stopping":
            self._note_stop()

    def _note_stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.tell("the protector is being stopped")

    def waits_for(self) -> str:
        """Return what is missing, to be shown after "waiting for"; "" if nothing is missing."""
        raise NotImplementedError


class Reload(Awaited):
    """Waits for the verdict of one reload or dry run."""

    cut_line = "the connection was cut: an upgrade or a crash; connecting again"

    def __init__(
        self,
        generation: int,
        status: Message,
        tell: Callable[[str], None],
        *,
        dry_run: bool = False,
    ) -> None:
        """generation: N, the number in the answer.  status: the status before the request."""
        super().__init__(tell)
        self.generation = generation
        self.dry_run = dry_run
        self._events = _DRY_RUN_VERDICTS if dry_run else _VERDICTS
        self.verdict: Verdict | None = None
        self._current: _Progress | None = None
        self._wanted = number_in(status, "workers_wanted")
        self._has_earlier_reload = any(
            each.get("phase") in _STARTING and number_in(each, "number") < generation
            for each in listed(status, "generations")
        )
        self._statuses_without = 0  # how many statuses in a row lacked this reload
        #: The last two generations that got new clients.
        self._routes: tuple[Any, Any] = (None, status.get("route"))
        self._phase = str(status.get("phase"))
        if self._has_earlier_reload:
            tell("an earlier reload is still in progress")

    def on_event(self, event: Message) -> None:
        """Process an event; ignore progress and verdicts of earlier generations."""
        super().on_event(event)
        name, number = event.get("event"), number_in(event, "generation")
        if name == "route":
            self._note_route(number)
        # While two generations share the new connections, the event `route` has the old generation
        # in `generation`, and the new generation in `sharing`.
        if name == "route" and number_in(event, "sharing") >= self.generation:
            self._show_share(number_in(event, "sharing"), text_in(event, "share"))
        if self.verdict is not None or number < self.generation:
            return
        if name in self._events:
            reason, words = text_in(event, "reason"), text_in(event, "last_words")
            self.verdict = Verdict(self._events[name], number, reason, words)
        match name:
            case "spawned":
                self._progress_of(number)
                self._note_slot(event)
            case "worker-ready":
                self._show_ready(number, {number_in(event, "worker")})
            case "route":
                self._show_switch(number)

    def on_status(self, status: Message) -> None:
        """Process a status, which also reports the facts of events that we have missed."""
        super().on_status(status)
        self._phase = str(status.get("phase"))
        if self.verdict is not None:
            return
        self._note_route(number_in(status, "route"))
        self._wanted = number_in(status, "workers_wanted") or self._wanted
        reloads = [
            each
            for each in attempts_in(status, dry_run=self.dry_run)
            if number_in(each, "generation") >= self.generation
        ]
        for each in reloads:
            if each.get("result") in (*_SUCCESSES, "failed"):
                number, reason = number_in(each, "generation"), text_in(each, "reason")
                last_words = reason.partition("\n")[2]
                succeeded = each["result"] in _SUCCESSES
                self.verdict = Verdict(succeeded, number, headline(reason), last_words)
                return
        starting = [
            each
            for each in listed(status, "generations")
            if number_in(each, "number") >= self.generation and each.get("phase") in _STARTING
        ]
        for each in starting:
            number, workers = number_in(each, "number"), listed(each, "workers")
            ready = {number_in(w, "number") for w in workers if w.get("state") == "ready"}
            for worker in workers:
                self._note_slot(worker)
            self._show_ready(number, ready)
            if each.get("phase") == "settling":
                if status.get("route") in (number, None):
                    self._show_switch(number)
                else:
                    self._show_share(number)
        # Once we have shown which generation is starting, hide waits of kind `earlier-reload`.
        # They now mean that a later reload waits for our generation, or that our reload waits for
        # the restart of the old version, which we have shown already.
        kinds = [
            each for each in _RELOAD_WAITS if self._current is None or each != "earlier-reload"
        ]
        self.waits.on_status(status, kinds)
        # "waiting": no generation is serving, as during a reload with --reload-order stop-first.
        under_way = self._phase in (*_STARTING, "reloading", "waiting")
        if reloads or starting or under_way or self.stopping or status.get("reload_wanted"):
            self._statuses_without = 0
            return
        # Fail only after three statuses in a row without this reload: one such status is normal
        # between the end of an earlier reload and the beginning of this reload.
        self._statuses_without += 1
        if self._statuses_without > 2:
            reason = "the verdict is no longer known; see `history` and the log"
            self.verdict = Verdict(False, self.generation, reason)

    def _note_route(self, number: int) -> None:
        if number and number != self._routes[1]:
            self._routes = self._routes[1], number

    @property
    def old(self) -> object:
        """The generation that got new clients before the verdict's generation; None: unknown.

        May differ from the route before the request: an earlier reload may have ended since.
        """
        new = self.verdict.generation if self.verdict is not None else self.generation
        earlier, last = self._routes
        return earlier if last == new else last

    # -- progress -----------------------------------------------------------------

    def _progress_of(self, number: int) -> _Progress:
        """Return what has been shown of a generation; if nothing, show that it is starting."""
        if self._current is None or self._current.number != number:
            self._current = _Progress(number)
            self.tell(f"generation {number} is starting")
        return self._current

    def _note_slot(self, worker: Message) -> None:
        """Raise the number of wanted workers to at least the worker's slot + 1.

        Slots count from 0.  If a reload adds workers, the status shows the higher number in
        `workers_wanted` only after the reload.
        """
        self._wanted = max(self._wanted, number_in(worker, "slot") + 1)

    def _show_ready(self, number: int, workers: set[int]) -> None:
        """Note these workers as ready.

        If the count has grown and the throttle allows another line, show the count.
        """
        progress = self._progress_of(number)
        if not workers <= progress.ready:
            progress.ready |= workers
            remaining, words = self._not_ready(progress), f"ready {self._ready_text(progress)}"
            if progress.throttle.should_show(remaining, words):
                self.tell(words)

    def _not_ready(self, progress: _Progress) -> int:
        """Return how many of the wanted workers are not ready yet."""
        return max(self._wanted - len(progress.ready), 0)

    def _ready_text(self, progress: _Progress) -> str:
        """Return the number of ready workers and of all workers, such as 1/4."""
        return f"{len(progress.ready)}/{len(progress.ready) + self._not_ready(progress)}"

    def _show_switch(self, number: int) -> None:
        """Show, once, that a generation gets all new connections."""
        progress = self._progress_of(number)
        if not progress.switch_shown:
            progress.switch_shown = True
            self.tell(f"switched: new connections go to generation {number}")

    def _show_share(self, number: int, share: str = "a share") -> None:
        """Show, once, that a generation gets a share of the new connections."""
        progress = self._progress_of(number)
        if not progress.share_shown:
            progress.share_shown = True
            self.tell(f"switched: {share} of new connections go to generation {number}")

    def waits_for(self) -> str:
        """Return what is missing before the verdict; "" after the verdict."""
        return "" if self.verdict else self.waits.with_reasons(self._waits_for())

    def _waits_for(self) -> str:
        if self.stopping:
            return "the end of the protector, which is being stopped"
        if self._current is None:
            if self._has_earlier_reload:
                return "an earlier reload to end"
            return f"generation {self.generation} to start (phase: {self._phase})"
        if self._current.switch_shown:
            return f"generation {self._current.number} to survive --settle"
        if self._current.share_shown:
            return f"generation {self._current.number} to get all clients"
        ready = self._ready_text(self._current)
        return f"generation {self._current.number} to become ready ({ready} workers are ready)"


class Losses:
    """Counts the connections that the protector and its workers lose between two statuses."""

    def __init__(self, before: Message) -> None:
        """before: the first status.  The caller then passes every event to on_event()."""
        self._before = before
        self._by_workers = 0

    def on_event(self, event: Message) -> None:
        """Add the connections that an exited worker lost, if the event reports an exit."""
        if event.get("event") == "exited":
            self._by_workers += number_in(event, "lost")

    def count(self, after: Message) -> int | None:
        """Return how many connections were lost from the first status to the status `after`.

        Returns None if the number is unknown.
        """
        before = self._before
        by_protector = measure(before, "lost"), measure(after, "lost")
        # The number is unknown under --handoff listener, because the protector's `lost` is None.
        # The number is also unknown after an upgrade or crash (each increases `restarts`), because
        # we may have missed events.
        if None in by_protector or before.get("restarts") != after.get("restarts"):
            return None
        both = [*listed(before, "generations"), *listed(after, "generations")]
        if any(each.get("serving_since_at") and each.get("lost") is None for each in both):
            return None  # some generation's workers do not count their connections
        return number_in(after, "lost") - number_in(before, "lost") + self._by_workers


def attempts_in(status: Message, *, dry_run: bool) -> list[Message]:
    """Return the reloads in a status; with `dry_run`, the last dry run instead."""
    if not dry_run:
        return listed(status, "reloads")
    last = status.get("dry_run")
    return [last] if isinstance(last, dict) else []


def ending_generations(status: Message, before: float = math.inf) -> tuple[int, str]:
    """Return the number of workers in ending generations, and a text about these generations.

    The text is "" if there is no such generation.
    before: count only generations with a number below this.
    """
    ending = [
        each
        for each in listed(status, "generations")
        if number_in(each, "number") < before and each.get("phase") in ENDING
    ]
    if not ending:
        return 0, ""
    workers = [worker for each in ending for worker in listed(each, "workers")]
    words = f"{len(workers)} {plural(len(workers), 'worker')}"
    if pids := [str(number_in(each, "pid")) for each in workers if number_in(each, "pid")]:
        words += f": pid {', '.join(pids[:5])}" + (", ..." if len(workers) > 5 else "")
    active = [number for each in ending if isinstance(number := each.get("active"), int)]
    if len(active) == len(ending):  # otherwise some generation's count is unknown
        words += f", {sum(active)} {plural(sum(active), 'connection')}"
    numbers = ", ".join(str(number_in(each, "number")) for each in ending)
    return len(workers), f"{plural(len(ending), 'generation')} {numbers} ({words})"
