"""A life that goes wrong once at each step: each system call is a kill, and each fails.

The seed chooses the settings, and a story: what is asked for and what befalls workers, in which
order.  All goes well but for that, and clients come at every moment.  At each system call of the
protector this process forks.  In one child the protector is killed there, maybe once more soon
after; in another the call fails, once or for as long as a folder cannot be written to.  Each child
reloads once more, comes to rest and ends as any life does.  Some children fork, too: at each call
with which the next program resumes.

So a protector is killed at each step of each verb of its delivery: `points` has where that was, of
what was `reached`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from socketprotector.core.events import HoldReleased
from socketprotector.model.settings import Settings
from tests.simulation.handed import Handed
from tests.simulation.kernel import FAULTS, Killed
from tests.simulation.points import point
from tests.simulation.world import World

#: What happens in one story.
ACTS = 9
#: What a call may be made to do: one of its failures, or this.
KILL = 0
#: How often what one place calls goes wrong, for one verb and story; later, at powers of 2.
OFTEN = 3
#: A child is killed once more, in one of so many lives, after so many calls at most.
TWICE, SOON = 3, 200
#: In one of so many lives each of the first calls of the next program is a kill, too.
FOLLOWED, RESUMING = 25, 120
#: How an event begins that says in which stage of a rollout a program ended.
STRUCK = "killed in "
#: What fails as long as the folder of a path cannot be written to.
UNWRITABLE = errno.EACCES


class Story(World):
    """One life, and those that come off it."""

    def __init__(
        self,
        seed: int,
        note: Callable[[str], None] | None = None,
        *,
        struck: tuple[int, int] | None = None,
        heard: Callable[[dict[str, Any]], None] = lambda found: None,
        share: float = 1.0,
        acts: Collection[str] = (),
    ) -> None:
        """struck: at which call what happens, in a life alone; else in a child each.

        heard: what a child has found.  share: of the calls that may go wrong, how many do.
        acts: what happens in the story; else the seed chooses that.
        """
        self._plot = random.Random(f"story {seed}")
        super().__init__(seed, 0, note)
        self._faulty = self._deadly = 0.0
        self._calm_turns = 0
        self._struck_at, self._heard, self._share = struck, heard, share
        self._is_child = False
        self._resumes = 0  # so many calls of the next program are a kill, too
        self._theirs: list[dict[str, Any]] = []  # by children of a child
        self._n = 0
        self._once_more = 0
        self._breaks = False  # the release that is deployed
        self._broken: list[Any] = []
        self.reached: set[tuple[str, str]] = set()  # by verb and place
        self.points: Counter[tuple[str, str]] = Counter()  # where it was killed
        self._story = [*(acts or self._chosen()), "stop"]

    def _choose(self, pick: Callable[[Any], Any]) -> Settings:
        if self.fd_store == "none":
            # Else a kill is the end.
            self.fd_store = self._plot.choice(("guard", "systemd"))
        return super()._choose(pick)

    def _unusual(self, settings: Settings, pick: Callable[[Any], Any]) -> Settings:
        found = super()._unusual(settings, pick)
        configured = self._plot.random() < 0.5
        return replace(found, origin=replace(found.origin, configured=configured))

    # -- the story -----------------------------------------------------------------

    def _acts_by_name(self) -> dict[str, tuple[Callable[[], None], int]]:
        """What may happen, and how often it is chosen."""
        return {
            "release": (self._release, 6),
            "broken release": (self._break, 3),
            "crash": (self._crash_all, 3),
            "upgrade": (self._upgrade, 2),
            "crowd": (self._crowd, 2),
            "scale": (self._scale, 1),
            "dry run": (self._dry_run, 1),
            "lame duck": (self._lame_duck, 1),
            "time": (self._pass_time, 1),
        }

    def _chosen(self) -> Iterator[str]:
        found = {name: often for name, (_, often) in self._acts_by_name().items()}
        yield from self._plot.choices(list(found), list(found.values()), k=ACTS)

    def _release(self) -> None:
        self._breaks = False
        self._hup()

    def _break(self) -> None:
        self._breaks = True
        self._hup()

    def _crash_all(self) -> None:
        for worker in self.workers:
            self._end(worker, os.CLD_KILLED, 11)

    def _pass_time(self) -> None:
        self.kernel.clock_ns += 20_000_000_000

    def _go_on_with_the_story(self) -> None:
        name = self._story.pop(0)
        self._say(f"-- {name}")
        self.kernel.changes += 1
        if name == "stop":
            self._term()
        else:
            self._acts_by_name()[name][0]()

    def _start(self, argv: Any, environment: Any, given: Any) -> int:
        pid = super()._start(argv, environment, given)
        if self._breaks:
            self._broken.append(self._processes[pid])
        return pid

    # -- turns ---------------------------------------------------------------------

    def _turn(self, timeout: float | None) -> list[tuple[int, int]]:
        self._check()
        due = None if timeout is None else self.kernel.clock_ns + int(timeout * 1e9) + 1
        if self._story and self._chance() < 0.05:
            self._go_on_with_the_story()  # amid what came before
        return self._calm_turn(due)

    def _all_do_well(self) -> None:
        while self._broken:
            self._end(self._broken.pop(), os.CLD_EXITED, 1)
        if self._calm or self._chance() < 0.4:
            super()._all_do_well()
            return
        self._keep()
        for _ in range(6):
            self.kernel.changes += 1
            self._plot.choice(self._little_things())()

    def _little_things(self) -> list[Callable[[], None]]:
        """What clients and workers do."""
        return [self._connect, self._take, self._finish, self._become_ready, self._obey]

    def _tempt(self) -> bool:
        if self._calm:
            return super()._tempt()
        if self._story:
            self._go_on_with_the_story()
        else:
            self._be_calm()
        return True

    def _be_calm(self) -> None:
        self._breaks = False
        self.kernel.unwritable = 0
        super()._be_calm()

    # -- what goes wrong -------------------------------------------------------------

    def _interfere_later(self) -> None:
        self.kernel.quiet_calls = 1 << 62 if self._calm else 1

    def _strike(self, call: str) -> int:
        self._interfere_later()
        if self._calm:
            return 0
        self._n += 1
        found = self._goes_wrong(call)
        if found is not None:
            return found
        if self._chance() < 0.2:
            self._meanwhile = True
            self._plot.choice(self._little_things())()
            self._meanwhile = False
        return 0

    def _goes_wrong(self, call: str) -> int | None:
        """Return what a call fails with, if it does.  Raises Killed."""
        if self._is_child:
            self._once_more -= 1
            if self._once_more == 0 and self._has_begun():
                self._kill()
            if self._resumes > 0 and self._has_begun():
                self._resumes -= 1
                verb, where = point()
                place = verb, f"{where} {call}"
                self.reached.add(place)
                if self._is_due(place) and self._fork(f"{verb} {where} {call}", KILL):
                    self._resumes = 0
                    self._kill()
            return None
        if not self._has_begun():
            return None
        may_fail = call != "pwrite" or bool(self._state.slots)
        codes = FAULTS.get(call, ()) if may_fail else ()
        if self._struck_at is not None:
            number, what = self._struck_at
            if number != self._n:
                return None
            self._say(f"  here: {point()}")
            return self._suffer(call, what)
        verb, where = point()
        its = random.Random(f"{self.seed} {self._n}")  # not the story's: that is the same without
        chosen = (KILL, *its.sample(codes, min(1, len(codes))))
        place = verb, f"{where} {call}"
        self.reached.add(place)
        if self._share < its.random() or not self._is_due(place):
            return None
        for what in chosen:
            if self._fork(f"{verb} {where} {call}", what):
                return self._suffer(call, what)
        return None

    def _is_due(self, place: tuple[str, str]) -> bool:
        """Whether a call from one place goes wrong that comes again: the first ones, then few."""
        self.points[place] += 1
        again = self.points[place]
        return again <= OFTEN or again.bit_count() == 1

    def _suffer(self, call: str, what: int) -> int:
        """Have a call go wrong."""
        its = random.Random(f"{self.seed} {self._n} {what}")
        self._is_child = True
        self._story = ["release", *self._story[-1:]]
        self.reached.clear()
        self.points.clear()
        if its.randrange(TWICE) == 0:
            self._once_more = its.randrange(1, SOON)
        elif its.randrange(FOLLOWED) == 0 and what == KILL and self._struck_at is None:
            self._resumes = RESUMING
        if what == KILL:
            self._kill()
        self.faults += 1
        if what == UNWRITABLE and its.random() < 0.5:
            self.kernel.unwritable = what
        return what

    def _kill(self) -> None:
        self.kernel.dead = True
        raise Killed

    def _fork(self, at: str, what: int) -> bool:
        """Say whether this is the child; the parent goes on when it has ended."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._told_by = writing
            self._theirs = []
            return True
        os.close(writing)
        with open(reading, "rb") as told:
            found = told.read()
        _, status = os.waitpid(pid, 0)
        said = json.loads(found) if found else {"error": f"ended with status {status}"}
        said = {"seed": self.seed, "call": self._n, "what": what, "at": at, **said}
        if self._is_child:
            self._theirs.append(said)
        else:
            self._heard(said)
        return False

    def live(self) -> None:
        """Run; a child never returns."""
        error = ""
        try:
            super().live()
        except Exception as failed:
            if not self._is_child or self._struck_at is not None:
                raise
            frames = traceback.extract_tb(failed.__traceback__)[-1]
            error = f"{type(failed).__name__}: {failed} ({frames.name})"
        if self._is_child and self._struck_at is None:
            found = {
                "error": error,
                "turns": self.turns,
                "kills": self.kills,
                "faults": self.faults,
                "connections": self.connections,
                "upgrades": self.upgrades,
                "lost": self.lost,
                "stages": {name: n for name, n in self.events.items() if name.startswith(STRUCK)},
                "points": [(*place, count) for place, count in self.points.items()],
                "found": self._theirs,
            }
            with suppress(BrokenPipeError), open(self._told_by, "wb") as told:
                told.write(json.dumps(found).encode())
            os._exit(0)


class ListenerStory(Story, Handed):
    """One where workers accept."""

    def _acts_by_name(self) -> dict[str, tuple[Callable[[], None], int]]:
        return super()._acts_by_name() | {
            "hold": (self._hold, 3),
            "end of the hold": (partial(self._request, "hold", HoldReleased()), 2),
            "mischief": (self._mischief, 3 * self._mischievous),
            "file removed": (self._remove_a_file, 2 * self._mischievous),
            "folder": (self._folder, 2),
        }

    def _little_things(self) -> list[Callable[[], None]]:
        return [*super()._little_things(), self._shake, self._speak, self._read, self._fork_child]
