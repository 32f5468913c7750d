"""The verdict of a reload, derived from events and from status: pure, and never too early.

Two sources, because a connection may be cut and events be missed: whatever an event says,
`status` says too, later.  The verdict is the first `reloaded` or `reload-failed` for the promised
generation, or for a later one; nothing else is a success.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .client import Message
from .fields import listed, number_in, text_in

#: Generations that no longer get connections, and workers that leave.
LEAVING = ("draining", "abandoned")
#: Of more workers than this only each further part of so many is worth a line.
_PARTS = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it ended."""

    taken: bool
    generation: int
    reason: str = ""
    last_words: str = ""


@dataclass(slots=True)
class ProgressThrottle:
    """What was said of a count of workers: each change of a few, each tenth part of many."""

    _whole: int = 0
    _last: object = None

    def is_news(self, left: int, words: str) -> bool:
        """Say whether this text, about so many workers that are left, is to be shown."""
        self._whole = max(self._whole, left)
        mark = words if self._whole <= _PARTS else -(-left * _PARTS // self._whole)
        before, self._last = self._last, mark
        return mark != before


@dataclass(slots=True)
class _Generation:
    """The state of the generation that starts."""

    number: int
    spawned: set[int]
    ready: set[int]
    shown: ProgressThrottle = field(default_factory=ProgressThrottle)
    routed: bool = False


class Reload:
    """One reload that is waited for.  `steps` are to be shown, each once."""

    def __init__(self, generation: int, status: Message) -> None:
        """`generation`: what `reload` answered.  status: how it stood before."""
        self.generation = generation
        self.verdict: Verdict | None = None
        self.steps: list[str] = []
        self.stopping = False
        self._now: _Generation | None = None
        self._wanted = number_in(status, "workers_wanted")
        self._ahead = any(
            each.get("phase") in ("starting", "settling") and number_in(each, "number") < generation
            for each in listed(status, "generations")
        )
        self._forgotten = 0
        self._phase = str(status.get("phase"))
        if self._ahead:
            self.steps.append("the reload before it is still going on")

    # -- what is heard ---------------------------------------------------------

    def heard(self, event: Message) -> None:
        """Take an event."""
        name, number = event.get("event"), number_in(event, "generation")
        if name == "stopping":
            self._stops()
        if self.verdict is not None or number < self.generation:
            return
        worker = number_in(event, "worker")
        if name == "reloaded":
            self._judge(Verdict(True, number))
        elif name == "reload-failed":
            reason, words = text_in(event, "reason"), text_in(event, "last_words")
            self._judge(Verdict(False, number, reason, words))
        elif name == "spawned":
            self._starting(number).spawned.add(worker)
        elif name == "worker-ready":
            self._ready(number, {worker})
        elif name == "route":
            self._switched(number)

    def looked(self, status: Message) -> None:
        """Take a status: all that events may have failed to say."""
        if self.verdict is not None:
            return
        self._wanted = number_in(status, "workers_wanted") or self._wanted
        self._phase = str(status.get("phase"))
        if status.get("phase") == "stopping":
            self._stops()
        for each in listed(status, "reloads"):
            number = number_in(each, "generation")
            if number >= self.generation and each.get("result") in ("reloaded", "failed"):
                self._judge(Verdict(each["result"] == "reloaded", number, text_in(each, "reason")))
                return
        known = bool(status.get("reload_wanted"))
        for each in listed(status, "reloads"):
            known |= number_in(each, "generation") >= self.generation
        for each in listed(status, "generations"):
            number = number_in(each, "number")
            if number >= self.generation and each.get("phase") in ("starting", "settling"):
                known = True
                workers = listed(each, "workers")
                starting = self._starting(number)
                starting.spawned |= {number_in(worker, "number") for worker in workers}
                self._ready(
                    number,
                    {number_in(w, "number") for w in workers if w.get("state") == "ready"},
                )
                if each.get("phase") == "settling":
                    self._switched(number)
        self._remember(known or self._phase in ("starting", "reloading", "settling"))

    def _remember(self, known: bool) -> None:
        # Twice: between the end of one reload and the begin of the next, once says nothing.
        self._forgotten = 0 if known or self.stopping else self._forgotten + 1
        if self._forgotten > 2:
            reason = "the protector knows nothing of it any more; see its log"
            self._judge(Verdict(False, self.generation, reason))

    # -- what follows -------------------------------------------------------------

    def _judge(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def _stops(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.steps.append("the protector is being stopped")

    def _starting(self, number: int) -> _Generation:
        if self._now is None or self._now.number != number:
            self._now = _Generation(number, set(), set())
            self.steps.append(f"generation {number} is starting")
        return self._now

    def _ready(self, number: int, workers: set[int]) -> None:
        starting = self._starting(number)
        if not workers <= starting.ready:
            starting.ready |= workers
            left, words = self._left(starting), f"ready {self._share(starting)}"
            if starting.shown.is_news(left, words):
                self.steps.append(words)

    def _left(self, starting: _Generation) -> int:
        return max(self._wanted - len(starting.ready), 0)

    def _share(self, starting: _Generation) -> str:
        return f"{len(starting.ready)}/{len(starting.ready) + self._left(starting)}"

    def _switched(self, number: int) -> None:
        starting = self._starting(number)
        if not starting.routed:
            starting.routed = True
            self.steps.append(f"switched: new connections go to generation {number}")

    def waits_for(self) -> str:
        """Say what is still to come."""
        if self.stopping:
            return "the protector to end, which is being stopped"
        if self._now is None:
            if self._ahead:
                return "the reload before it to end"
            return f"generation {self.generation} to be started ({self._phase})"
        if self._now.routed:
            return f"generation {self._now.number} to live as long as --settle"
        return f"generation {self._now.number} to be ready ({self._share(self._now)} workers are)"


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """The workers and connections left of the generations before one."""

    generations: tuple[int, ...] = ()
    pids: tuple[int, ...] = ()
    workers: int = 0
    active: int | None = 0

    @property
    def over(self) -> bool:
        """Whether all of them are gone."""
        return not self.generations

    def words(self) -> str:
        """Say in words what is left."""
        numbers = ", ".join(str(number) for number in self.generations)
        several = "" if self.active == 1 else "s"
        connections = "" if self.active is None else f", {self.active} connection{several}"
        some = ", ".join(str(pid) for pid in self.pids[:5]) + (", ..." if self.workers > 5 else "")
        plural = "s" if len(self.generations) > 1 else ""
        workers = f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        pids = f": pid {some}" if self.pids else ""
        return f"generation{plural} {numbers} ({workers}{pids}{connections})"


def draining(status: Message, before: int) -> DrainProgress:
    """Return what is left of the generations that drain and are older than `before`."""
    found = DrainProgress()
    for each in listed(status, "generations"):
        number = number_in(each, "number")
        if number >= before or each.get("phase") not in LEAVING:
            continue
        workers = listed(each, "workers")
        pids = (number_in(worker, "pid") for worker in workers)
        active = each.get("active")
        known = isinstance(active, int) and found.active is not None
        found = replace(
            found,
            generations=(*found.generations, number),
            pids=(*found.pids, *(pid for pid in pids if pid)),
            workers=found.workers + len(workers),
            active=(found.active or 0) + active if known and isinstance(active, int) else None,
        )
    return found
