"""Lives with releases: good and bad ones are deployed and rolled back, and `current` is moved.

Apart from the other lives, so that each of those goes on as it did before.  The folder of `current`
is in memory.  Each of its calls may fail, or kill the protector.
"""

from __future__ import annotations

import errno
import os
import posixpath
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from socketprotector.core.events import RollbackRequested
from socketprotector.core.reload import cannot_call_off
from socketprotector.daemon import current_link, release_history, releases
from socketprotector.daemon.config_reader import ConfigAnswer
from socketprotector.daemon.control import releases as requests
from socketprotector.model import release
from socketprotector.model.control_requests import RequestError
from socketprotector.model.settings import Origin
from tests.simulation.each_step import ListenerStory, Story
from tests.simulation.files import failure
from tests.simulation.handed import Handed
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from socketprotector.core.fleet import Fleet
    from socketprotector.daemon.effects import Effects
    from socketprotector.daemon.runtime import Runtime
    from socketprotector.model.settings import Settings

FOLDER, CURRENT = "/srv/releases", "/srv/live/current"
GOOD, BAD = ("1", "2", "3", "4"), ("bad", "worse")
#: What each call that changes the folder of `current` may fail with.
CODES = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)


class FakeStore:
    """Stand-in for system/release_store.py, and for the process that writes the history."""

    def __init__(self, world: Deployed) -> None:
        self._world = world
        self.current = GOOD[0]
        self.next = ""
        self.written = b""  # the history

    def _enter(self, call: str) -> None:
        self._world.kernel.enter(call)
        if self._world.refuses and not self._world._calm:
            raise failure(self._world.refuses)

    def lock(self, _: str) -> int:
        return 99

    def is_lock(self, *_: object) -> bool:
        return True

    def unlock(self, _: int) -> None:
        pass

    def leads_to(self, *_: str) -> str:
        return self.current

    def prepare(self, _: str, target: str) -> None:
        if self.next != target:
            self._enter("symlink")
            self.next = target

    def move(self, current: str, folder: str, name: str) -> None:
        if self.current == name:
            self.discard(current)
            return
        self.prepare(current, posixpath.join(folder, name))
        self._enter("rename current")
        assert self.next == posixpath.join(FOLDER, name)
        self._world.moved(name)
        self.current, self.next = name, ""
        self._world.kernel.enter("after the rename")

    def discard(self, _: str) -> None:
        self._world.kernel.enter("unlink current")
        self.next = ""

    def history(self, _: str) -> bytes | None:
        return self.written or None

    def withdraw_writers(self, _: str) -> None:
        pass  # a kill drops the timers, and so the writers

    def in_the_way(self, _: str) -> str:
        return ""

    def fingerprint(self, *_: str) -> None:
        return None

    def write(
        self, _: str, history: release.ReleaseHistory, __: Any, done: Callable[[str], None]
    ) -> None:
        """In the place of release_history.write()."""
        self._enter("posix_spawn")
        content = release.dump(history)

        def end() -> None:
            fails = not self._world._calm and self._world._chance() < self._world._faulty / 3
            if not fails:
                self.written = content
            done("No space left on device" if fails else "")

        self._world._loop.call_after("release writer", self._world._chance(), end)


class Deployed(World):
    """A life whose operators deploy and roll back, and move `current` by hand now and then."""

    UNUSUAL = False

    def _choose(self, pick: Callable[[Any], Any]) -> Settings:
        self.disk = FakeStore(self)
        self.refuses = 0  # what each call that changes the folder of `current` fails with
        self._by_hand: set[str] = {GOOD[0]}  # what was put there, maybe without a proof
        self._last_hand = ""
        self._routed: set[str] = set()
        return replace(
            super()._choose(pick),
            ready_after_s=None,
            releases=FOLDER,
            current=CURRENT,
            release=GOOD[0],
        )

    def _unusual(self, settings: Settings, pick: Callable[[Any], Any]) -> Settings:
        found = super()._unusual(settings, pick)
        return replace(found, origin=Origin(configured=True))

    def _what_happens(self) -> list[tuple[Callable[[], None], int]]:
        return [
            *super()._what_happens(),
            (self._become_ready, 200),  # else most deploys fail
            (self._deploy_good, 30),
            (self._deploy_bad, 15),
            (self._go_back, 12),
            (self._move_by_hand, 3),
            (self._refuse, 4),
            (self._accept, 12),
        ]

    # -- what operators and the disk do ------------------------------------------------

    def _deploy_good(self) -> None:
        self._order(self._random.choice(GOOD))

    def _deploy_bad(self) -> None:
        self._order(self._random.choice((*BAD, "gone")))

    def _order(self, name: str) -> None:
        force, dry = self._chance() < 0.5, self._chance() < 0.1

        def order(act: Effects, fleet: Fleet, runtime: Runtime) -> None:
            requests.deploy(act, fleet, runtime, name, force=force, dry_run=dry)

        self._ask("deploy", order)

    def _go_back(self) -> None:
        def order(act: Effects, fleet: Fleet, runtime: Runtime) -> None:
            if cannot_call_off(fleet):
                asked = requests.roll_back(act, fleet, runtime, "")
                assert asked["release"] not in BAD, "a rollback to what never served"
                assert asked["release"] != asked["from"], "a rollback to what is serving"
            else:
                runtime.post(RollbackRequested())

        self._ask("rollback", order)

    def _ask(self, what: str, order: Callable[[Effects, Fleet, Runtime], None]) -> None:
        """Have a client of the control socket order something."""
        protector = self._supervisor
        if self._starting or protector is None or self.kernel.wake is None:
            return

        def ask() -> None:
            if protector.fleet.stopping or not protector.fleet.served:
                return
            try:
                order(protector.effects, protector.fleet, protector.runtime)
            except RequestError as error:
                self._say(f"{what} is refused: {error}")
                self.events[f"{what} refused"] += 1
            else:
                self.events[what] += 1

        self._loop.call_after(what, 0.0, ask)
        self._children_ended()  # so that it looks whose time has come

    def _move_by_hand(self) -> None:
        name = self._random.choice((*GOOD, BAD[0]))
        self._say(f"an operator moves current to {name}")
        self.disk.current = self._last_hand = name
        self._by_hand.add(name)

    def _refuse(self) -> None:
        self.refuses = self._random.choice(CODES)

    def _accept(self) -> None:
        self.refuses = 0

    # -- the configuration and the workers ----------------------------------------------

    def _read_again(self, old: Settings) -> ConfigAnswer:
        name = old.release_wanted or self.disk.current
        if name == "gone":
            return ConfigAnswer(f"release {FOLDER}/gone: No such file or directory")
        found = super()._read_again(old)
        if found.settings is not None:
            found.settings = replace(found.settings, release=name, release_wanted="")
        return found

    def _start(self, argv: Any, environment: Any, given: Any) -> int:
        pid = super()._start(argv, environment, given)
        self._processes[pid].release = environment[release.VARIABLE]
        return pid

    def _say_ready(self, worker: Any, more: bytes = b"") -> bool:
        if worker.release in BAD:
            self._end(worker, os.CLD_EXITED, 1)
            return False
        return super()._say_ready(worker, more)

    def _with_releases(self, effects: Effects, runtime: Runtime) -> None:
        live = effects.live_settings
        live.releases = releases.Releases(lambda: live.settings, runtime, None)

    def _replaced(self) -> Iterator[tuple[Any, str, Any]]:
        yield from super()._replaced()
        path = SimpleNamespace(
            join=posixpath.join, isdir=lambda path: posixpath.basename(path) != "gone"
        )
        for module in (releases, current_link, release_history):
            yield module, "release_store", self.disk
            yield module, "os", SimpleNamespace(path=path)
        yield release_history, "write", self.disk.write

    # -- what must hold ----------------------------------------------------------------

    def moved(self, name: str) -> None:
        """Check a move of `current` by the protector."""
        assert name not in BAD, f"current is moved to {name}, which never served"
        if self._supervisor is not None:
            self._note_route(self._supervisor.effects)
        assert name in self._routed, f"current is moved to {name} before it is proved"
        self._last_hand = ""
        self.events["current moved"] += 1

    def _check_fleet(self, fleet: Fleet, act: Effects) -> None:
        super()._check_fleet(fleet, act)
        self._note_route(act)

    def _note_route(self, act: Effects) -> None:
        if act._route is not None:
            self._routed.add(act.generations[act._route].program.release)

    def _check(self) -> None:
        super()._check()
        assert self.disk.current not in BAD or self.disk.current in self._by_hand
        history = release.load(self.disk.written) if self.disk.written else release.ReleaseHistory()
        assert not set(BAD).intersection(history.way), f"{history.way} has a release that failed"

    def _said(self, event: str, fields: Mapping[str, Any]) -> None:
        super()._said(event, fields)
        if event == "reload-failed" and self.disk.current in BAD:
            self._crowded = True  # each reload would try what `current` names
        protector = self._supervisor
        if event != "reloaded" or protector is None or protector.fleet.stopping:
            return
        its = protector.effects.live_settings.releases
        assert its is not None
        named = self.disk.current == fields["release"]
        assert named or its.link.due or self._last_hand, "a verdict comes before current is moved"

    def _check_serving(self, number: int) -> None:
        super()._check_serving(number)
        assert self._supervisor is not None
        act = self._supervisor.effects
        its, serves = act.live_settings.releases, act.generations[number].program.release
        assert its is not None
        assert serves == its.serving, f"{serves} is serving, and the settings are of {its.serving}"
        assert {worker.release for worker in self.workers if not worker.ended} == {serves}
        assert its.is_saved, f"not on disk: {its.error}"
        assert self.disk.current == serves or self._last_hand, "current names another release"
        assert not self.disk.next, "current.next is left behind"
        assert its.history.value.way[-1:] == (serves,), (
            f"{serves} is serving, not {its.history.value.way}"
        )
        assert release.load(self.disk.written) == its.history.value, "another history is on disk"


class DeployedListener(Deployed, Handed):
    """The same where workers accept."""


class DeployedStory(Story, Deployed):
    """A story of deploys: the protector is killed, and each of its calls fails, in each step."""

    def _acts_by_name(self) -> dict[str, tuple[Callable[[], None], int]]:
        return super()._acts_by_name() | {
            "deploy": (self._deploy_good, 8),
            "bad deploy": (self._deploy_bad, 4),
            "rollback": (self._go_back, 4),
            "by hand": (self._move_by_hand, 1),
        }


class DeployedListenerStory(ListenerStory, DeployedStory, DeployedListener):
    """One where workers accept."""


#: By --handoff.
DEPLOYED: dict[str, type[World]] = {"connection": Deployed, "listener": DeployedListener}
DEPLOYED_STORIES: dict[str, type[Story]] = {
    "connection": DeployedStory,
    "listener": DeployedListenerStory,
}
