"""The settings in force, the candidate settings of a reload, and the process that reads them.

Candidate settings are used by the next generation and take effect once that serves; otherwise they
are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..core.actions import UseSettings
from ..core.events import SettingsFailed, SettingsRead
from ..core.snapshot import Snapshot
from ..model.lazy_dataclass import replace
from ..model.records import SettingsRecord
from ..model.settings import ListenerSettings, Settings
from ..system.listener import Listener
from ..system.listeners import listener_of
from . import config_reader
from .delivery import Delivery
from .runtime import Runtime
from .worker_pool import WorkerPool


class LiveSettings:
    """Holds the settings, and tells worker pool and delivery when they are others."""

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        *,
        pool: WorkerPool,
        delivery: Delivery,
        command: tuple[str, ...],
    ) -> None:
        """command: executes this program again."""
        #: What another program would have to know.  Replaced whole, as each that is written down.
        self.record = SettingsRecord(settings)
        self._pool = pool
        self._delivery = delivery
        self._log, self._post, self._persist = runtime.log, runtime.post, runtime.persist
        self._command, self._loop = command, runtime.loop
        self._readers: dict[str, config_reader.ConfigReader] = {}  # by what they read for

    @property
    def settings(self) -> Settings:
        """Those that hold."""
        return self.record.current

    def read(self, *, dry_run: bool) -> None:
        """Have them read again; what comes of it is an event.

        dry_run: the generation that is to use them gets no clients, of added listeners neither.
        """
        try:
            reader = self._reader("reader")
        except MemoryError:
            self._post(SettingsFailed("cannot read the configuration: out of memory"))
            return
        reader.read(self.settings, partial(self._on_config_read, dry_run=dry_run))

    def compare(self, done: Callable[[config_reader.ConfigAnswer], None]) -> bool:
        """Find out what a reload would change, and call back; False while that is going on."""
        comparer = self._reader("comparer")
        if comparer.busy:
            return False
        comparer.read(self.settings, done, dry=True)
        return True

    def _reader(self, purpose: str) -> config_reader.ConfigReader:
        """Return what reads the configuration.  Raises MemoryError: its module is a late one."""
        if purpose not in self._readers:
            made = config_reader.ConfigReader(self._command, self._loop, purpose)
            self._readers[purpose] = made
        return self._readers[purpose]

    def use(self) -> None:
        """Hold to what was read."""
        candidate = self.record.candidate
        if candidate is not None:
            if candidate.log_level != self.settings.log_level:
                self._log.set_level(candidate.log_level)
            self._hold_to(candidate)

    def forget(self) -> None:
        """Give up what was read.  The places of its listeners are never others'."""
        if "reader" in self._readers:
            self._readers["reader"].call_off()
        if self.record.candidate is not None:
            there = self.settings.listeners
            added = self.record.candidate.listeners[len(there) :]
            self.record = SettingsRecord(self.settings)
            if added:
                gone = (replace(each, removed=True) for each in added)
                self._hold_to(replace(self.settings, listeners=(*there, *gone)))

    def stop_reading(self) -> None:
        """End the processes that read: the program that replaces this one knows nothing of them."""
        for each in self._readers.values():
            each.call_off()

    # -- to the next program and from the one before -----------------------------

    def adopt(self, snapshot: Snapshot) -> None:
        """Go on with what was read: the fleet says whether it is still to be tried.

        If it is to be used, that is ordered again.
        """
        self.record = SettingsRecord(self.settings, snapshot.settings.candidate)
        if snapshot.fleet.candidate is None and UseSettings() not in snapshot.unfinished:
            self.forget()
        self._remove_listeners()

    def note_rebound(self, listener: Listener) -> None:
        """Write down that a listener has another socket file: it is to be removed at the end."""
        index, its, candidate = listener.index, listener.settings, self.record.candidate
        self.record = SettingsRecord(
            _with_file(self.settings, index, its),
            _with_file(candidate, index, its) if candidate is not None else None,
        )
        self._persist()

    # -- inside ------------------------------------------------------------------

    def _on_config_read(self, answer: config_reader.ConfigAnswer, *, dry_run: bool) -> None:
        old, new = self.settings, answer.settings
        if new is None:
            lines = answer.failure.split("\n")
            for line in lines:
                self._log.write("error", "not-configured", text=line)
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            self._post(SettingsFailed("\n".join((lines[0] + more, *lines[1:]))))
            return
        added = [
            listener_of(
                fd,
                n,
                new.listeners[n],
                shared=self._delivery.shares_listeners,
                sibling=answer.siblings.get(n, -1),
                reserved=answer.reserved.get(n, -1),
            )
            for n, fd in answer.listeners.items()
        ]
        cannot = self._delivery.cannot_add(added)
        if cannot is not None:
            for each in added:
                each.close()
            self._post(SettingsFailed(cannot))
            return
        warnings = [each for each in new.warnings if each not in old.warnings]
        for text in (*new.notices[len(old.notices) :], *warnings):
            self._log.write("warning", "notice", text=text)
        self._log.write(
            "info",
            "dry-run-configured" if dry_run else "configured",
            changes="; ".join(answer.changes) or "none",
        )
        for index, its in enumerate(old.listeners):  # bound anew while that was read, maybe
            new = _with_file(new, index, its)
        self.record = SettingsRecord(old, new)
        for listener in added:
            self._delivery.add(listener, dry_run=dry_run)
        self._post(
            SettingsRead(new.policy, new.processes if new.processes != old.processes else None)
        )

    def _hold_to(self, settings: Settings) -> None:
        self.record = SettingsRecord(settings)
        self._pool.apply_settings(settings)
        self._remove_listeners()

    def _remove_listeners(self) -> None:
        places = self.settings.listeners  # one that was added and is only tried has none
        for listener in self._delivery.listeners:
            if listener.index < len(places) and places[listener.index].removed:
                self._log.write("info", "listener-removed", address=listener.settings.address)
                self._delivery.remove(listener)


def _with_file(settings: Settings, index: int, its: ListenerSettings) -> Settings:
    found = list(settings.listeners)
    if index < len(found):
        found[index] = replace(found[index], device=its.device, inode=its.inode, beside=its.beside)
    return replace(settings, listeners=tuple(found))
