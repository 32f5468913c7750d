"""The settings that hold, those that were read again, and who reads them.

What is read is tried with the next generation, and holds once that serves; else it is
forgotten, as if it had never been read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..core.events import Event, SettingsFailed, SettingsRead
from ..core.snapshot import Snapshot
from ..model.handoff import LISTENER
from ..model.settings import ListenerSettings, Settings, dump, load
from ..model.settings_diff import changes
from ..system.listener import Listener
from ..system.log import Log
from ..system.loop import Loop
from .config_reader import Answer, Reader
from .forwarder import Forwarder
from .generation import Home
from .socket_steering import SocketSteering
from .worker_pool import WorkerPool


class Configuration:
    """Holds the settings, and tells worker pool and forwarder when they are others."""

    def __init__(
        self,
        settings: Settings,
        *,
        pool: WorkerPool,
        forwarder: Forwarder,
        steering: SocketSteering,
        homes: Mapping[int, Home],
        command: tuple[str, ...],
        loop: Loop,
        log: Log,
        post: Callable[[Event], None],
    ) -> None:
        """command: executes this program again.  homes: of the generations; their owner's."""
        self.settings = settings
        self._pool = pool
        self._forwarder = forwarder
        self._steering = steering
        self._homes = homes
        self._log = log
        self._post = post
        self._coming: Settings | None = None  # read again, and not used yet
        self._changed = False  # the settings are others than at the start
        self._used = 0
        self._written: tuple[Settings | None, Settings | None] = None, None  # as what kept() gave
        self._texts = "", ""
        self._reader = Reader(command, loop, "reader")
        self._comparer = Reader(command, loop, "comparer")

    @property
    def to_try(self) -> Settings:
        """What a generation is to be opened with that is made from things as they are now."""
        return self._coming or self.settings

    def read(self) -> None:
        """Have them read again; what comes of it is an event."""
        self._reader.read(self.settings, self.settings.policy.start_timeout_s, self._were_read)

    def compare(self, done: Callable[[Answer], None]) -> bool:
        """Find out what a reload would change, and call back; False while that is going on."""
        if self._comparer.busy:
            return False
        limit_s = self.settings.policy.start_timeout_s
        self._comparer.read(self.settings, limit_s, done, dry=True)
        return True

    def use(self) -> None:
        """Hold to what was read."""
        if self._coming is not None:
            if self._coming.log_level != self.settings.log_level:
                self._log.set_level(self._coming.log_level)
            self._hold_to(self._coming)
            self._coming = None
            self._used += 1

    def forget(self) -> None:
        """Give up what was read.  The places of its listeners are never others'."""
        self._reader.call_off()
        if self._coming is not None:
            there = self.settings.listeners
            added = self._coming.listeners[len(there) :]
            self._coming = None
            if added:
                gone = (replace(each, removed=True) for each in added)
                self._hold_to(self.settings.listening((*there, *gone)))

    def stop_reading(self) -> None:
        """End the processes that read: the program that replaces this one knows nothing of them."""
        self._reader.call_off()
        self._comparer.call_off()

    # -- to the next program and from the one before -----------------------------

    def kept(self) -> tuple[str, str, int]:
        """Return what the state has to hold: the settings, if they are others than at the start,
        those that are tried, if there are any, and how often such were taken over.

        It is asked at each step, so they are dumped once.
        """
        wanted = self.settings if self._changed else None, self._coming
        if wanted != self._written:  # the same objects, nearly always
            settings, coming = wanted
            self._texts = _text(settings), _text(coming)
            self._written = wanted
        return *self._texts, self._used

    def adopt(self, snapshot: Snapshot) -> None:
        """Go on with what was read: the fleet says whether it is still to be tried."""
        self._used = snapshot.settings_used
        self._changed = bool(snapshot.settings)
        self._coming = load(snapshot.coming.encode()) if snapshot.coming else None
        if self._coming is not None and snapshot.fleet.candidate is None:
            if snapshot.fleet.settings_used > snapshot.settings_used:
                self.use()
            else:
                self.forget()
        self._remove_listeners()

    def bound_anew(self, listener: Listener) -> None:
        """A listener has another socket file, which is to be removed at the end."""
        index, its = listener.index, listener.settings
        self.settings = _with_file(self.settings, index, its)
        self._coming = _with_file(self._coming, index, its) if self._coming else None
        self._changed = True

    # -- inside ------------------------------------------------------------------

    def _were_read(self, answer: Answer) -> None:
        old, new = self.settings, answer.settings
        if new is None:
            lines = answer.failure.split("\n")
            for line in lines:
                self._log.write("error", "not-configured", text=line)
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            self._post(SettingsFailed("\n".join((lines[0] + more, *lines[1:]))))
            return
        for text in new.notices[len(old.notices) :]:
            self._log.write("warning", "notice", text=text)
        told = "; ".join(changes(old, new))
        self._log.write("info", "configured", changes=told or "none")
        for index, its in enumerate(old.listeners):  # bound anew while that was read, maybe
            new = _with_file(new, index, its)
        self._coming = new
        for index, fd in answer.listeners.items():
            shared, second = new.handoff == LISTENER, answer.seconds.get(index, -1)
            listener = Listener(fd, index, new.listeners[index], shared=shared, second=second)
            self._forwarder.add(listener)
            self._steering.expect(listener)
        self._post(
            SettingsRead(new.policy, new.processes if new.processes != old.processes else None)
        )

    def _hold_to(self, settings: Settings) -> None:
        self.settings = settings
        self._changed = True
        self._pool.settings_are(settings)
        self._remove_listeners()

    def _remove_listeners(self) -> None:
        """Empty what is removed into the newest generation that has served it."""
        places = self.settings.listeners  # one that was added and is only tried has none
        for listener in self._forwarder.listeners:
            if listener.index < len(places) and places[listener.index].removed:
                served = [
                    number
                    for number, home in self._homes.items()
                    if home.serving_since and not home.ended
                    if home.channel.knows_of(listener.index)
                ]
                to = self._homes[max(served)].channel if served else None
                self._log.write("info", "listener-removed", address=listener.settings.address)
                self._forwarder.remove(listener, to)


def _text(settings: Settings | None) -> str:
    return dump(settings).decode() if settings is not None else ""


def _with_file(settings: Settings, index: int, its: ListenerSettings) -> Settings:
    found = list(settings.listeners)
    if index < len(found):
        found[index] = replace(found[index], device=its.device, inode=its.inode)
    return settings.listening(tuple(found))
