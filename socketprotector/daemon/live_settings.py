"""The settings in force, and the candidate settings of a reload.

With --config or --releases, a reload starts its generation with candidate settings, which a
reader process has read (config_reader.py).  When this generation serves, the candidate settings
become the settings in force.  If the generation fails, or if it was only a dry run, the candidate
settings are dropped.

In docstrings and comments, `current` means the symbolic link that the option --current names.  The
link leads to a release.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from ..core.actions import Report, UseSettings
from ..core.events import SettingsFailed, SettingsRead
from ..core.rollout import NO_LIBRARY, no_canary_under
from ..core.snapshot import Snapshot
from ..model.lazy_dataclass import replace
from ..model.records import Program, SettingsRecord
from ..model.settings import ListenerSettings, Settings
from ..system.listener import Listener
from . import config_reader, releases
from .delivery import Delivery
from .runtime import Runtime
from .worker_pool import WorkerPool


class LiveSettings:
    """Holds the settings, and applies changes to the worker pool and the delivery."""

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        *,
        pool: WorkerPool,
        delivery: Delivery,
        command: tuple[str, ...],
    ) -> None:
        """command: the command line that executes SocketProtector again."""
        #: The record that the next program (after an upgrade or a kill) needs.
        self.record = SettingsRecord(settings)
        self._pool = pool
        self._delivery = delivery
        self._log, self._post, self._persist = runtime.log, runtime.post, runtime.persist
        self._command, self._loop = command, runtime.loop
        self._readers: dict[str, config_reader.ConfigReader] = {}  # by purpose
        self.releases: releases.Releases | None = None  # None: --releases is not in use
        #: Called after a reload's settings have come into force.
        self.on_used: Callable[[], object] = lambda: None

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.record.current

    def next_settings(self, *, fresh: bool) -> Settings:
        """Return the settings for the next generation.

        fresh: whether to prefer the candidate settings, if any, to the settings in force.
        """
        return (self.record.candidate if fresh else None) or self.settings

    def read(self, *, dry_run: bool, canary: bool = False, release: str = "") -> None:
        """Read the configuration again, in another process.

        Posts SettingsRead or SettingsFailed.

        dry_run: if True, the new generation gets no clients.  Added listeners do listen, but no
        worker accepts there: clients wait until the listeners are removed after the dry run.
        canary: whether the reload was requested with a canary.
        release: the release that the request names; "": it names none.
        """
        try:
            reader = self._reader("reader")
        except MemoryError:
            self._post(SettingsFailed("cannot read the configuration: out of memory"))
            return
        if self.releases is not None:
            release = self.releases.begin(release)
        done = partial(self._on_config_read, release, dry_run=dry_run, canary=canary)
        reader.read(replace(self.settings, release_wanted=release), done)

    def compare(self, done: Callable[[config_reader.ConfigAnswer], None]) -> bool:
        """Call `done` with what a reload would change.

        Returns False, without a call of `done`, if an earlier comparison is still running.
        If the reader process cannot start, `done` gets the failure before this method returns.
        Raises MemoryError: see _reader().
        """
        comparer = self._reader("comparer")
        if comparer.busy:
            return False
        release = self.releases.to_start() if self.releases is not None else ""
        comparer.read(replace(self.settings, release_wanted=release), done, dry=True)
        return True

    def _reader(self, purpose: str) -> config_reader.ConfigReader:
        """Return the reader for a purpose.

        config_reader.py is loaded at its first use.  Raises MemoryError if it cannot be loaded.
        """
        if purpose not in self._readers:
            made = config_reader.ConfigReader(self._command, self._loop, purpose)
            self._readers[purpose] = made
        return self._readers[purpose]

    def use(self) -> None:
        """Put the candidate settings in force."""
        candidate = self.record.candidate
        if candidate is not None:
            if candidate.log_level != self.settings.log_level:
                self._log.set_level(candidate.log_level)
            self._put_in_force(replace(candidate, release_wanted=""))
            # If `release_wanted` is empty, the reload started the release that `current` named.
            # Then `current` need not be moved.
            if self.releases is not None and candidate.release_wanted:
                self.releases.move(candidate.release)
            self.on_used()

    def forget(self) -> None:
        """Drop the candidate settings, or call off the reader process that reads them.

        Remove the listeners that the candidate settings added.  Add their entries, marked as
        removed, to the settings in force: so the listeners' indices stay taken, and are never used
        again.
        """
        if "reader" in self._readers:
            self._readers["reader"].call_off()
        if self.record.candidate is not None:
            kept = self.settings.listeners
            added = self.record.candidate.listeners[len(kept) :]
            self.record = SettingsRecord(self.settings)
            if added:
                removed = (replace(each, removed=True) for each in added)
                self._put_in_force(replace(self.settings, listeners=(*kept, *removed)))

    def reported(self, report: Report, program: Program | None) -> tuple[Report, str]:
        """Record what a report says about a release; return two values.

        The first value is the report, perhaps with a note about `current`.  The second value is the
        release's name; "": there is no program, or --releases is not in use.
        program: the program of the report's generation; None: the report has no open generation.
        """
        if self.releases is None:
            return report, ""
        name = program.release if program is not None else ""
        return self.releases.reported(report, program), name

    @property
    def current_due(self) -> str:
        """The release to which `current` could not be moved yet; "": there is none."""
        return self.releases.link.due if self.releases is not None else ""

    @property
    def named_at_begin(self) -> str:
        """The release to which `current` led when the last reload or dry run began; "": none."""
        return self.releases.named_at_begin if self.releases is not None else ""

    def stop_reading(self) -> None:
        """End the reader processes, because they cannot answer after an upgrade or our exit.

        If a reload was waiting for its settings, the next program reads the configuration again.
        `done` of compare() gets an answer at once: the comparison was called off.
        """
        for purpose, each in self._readers.items():
            called_off = "called off: an upgrade or a stop has begun"
            answer = config_reader.ConfigAnswer(called_off, code="busy")
            each.call_off(answer if purpose == "comparer" else None)

    # -- from one program to the next ---------------------------------------------

    def adopt(self, snapshot: Snapshot) -> None:
        """Adopt an earlier program's candidate settings, or drop them if no longer needed.

        They are needed if a reload is trying them, or if UseSettings must still be carried out.
        """
        self.record = SettingsRecord(self.settings, snapshot.settings.candidate)
        if snapshot.fleet.candidate is None and UseSettings() not in snapshot.unfinished:
            self.forget()
        self._remove_listeners(self.settings.listeners)

    def note_rebound(self, listener: Listener) -> None:
        """Record which socket file a listener has now (at a UNIX path)."""
        index, bound, candidate = listener.index, listener.settings, self.record.candidate
        self.record = SettingsRecord(
            _with_file(self.settings, index, bound),
            _with_file(candidate, index, bound) if candidate is not None else None,
        )
        self._persist()

    # -- inside ------------------------------------------------------------------

    def _on_config_read(
        self, release: str, answer: config_reader.ConfigAnswer, *, dry_run: bool, canary: bool
    ) -> None:
        old, new = self.settings, answer.settings
        if new is None:
            lines = answer.failure.split("\n")
            for line in lines:
                self._log.write("error", "not-configured", text=line)
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            self._post(SettingsFailed("\n".join((lines[0] + more, *lines[1:]))))
            return
        new = replace(new, release_wanted=release)
        added = [
            self._delivery.make_listener(
                n,
                new.listeners[n],
                (fd, answer.siblings.get(n, -1), answer.reserved.get(n, -1)),
                again=(0, 0, 0),
            )
            for n, fd in answer.listeners.items()
        ]
        removed = [each for each in self._delivery.listeners if new.listeners[each.index].removed]
        cannot = self._delivery.cannot_change(added, removed)
        cannot = cannot or self._cannot_roll_out(new, added, canary)
        if cannot is None and self.releases is not None:
            cannot = self.releases.prepare(new, dry_run=dry_run) or None
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
        # `new` has the devices and inodes of socket files as of the start of the reading.  A file
        # may have been replaced since, so take the present values from `old`.
        for index, bound in enumerate(old.listeners):
            new = _with_file(new, index, bound)
        self.record = SettingsRecord(old, new)
        for listener in added:
            self._delivery.add(listener, dry_run=dry_run)
        self._post(
            SettingsRead(new.policy, new.processes if new.processes != old.processes else None)
        )

    def _cannot_roll_out(
        self, new: Settings, added: Collection[Listener], canary: bool
    ) -> str | None:
        """Return why the reload cannot have its canary or its rolling order; None: it can.

        canary: whether the reload was requested with a canary.  The `reload` command has not
        checked the canary, because only `new` decides whether a canary is possible.
        """
        policy = new.policy
        cannot = no_canary_under(policy) if canary else None
        if cannot is None and (canary or policy.canary or policy.rolls):
            remaining = [e for e in self._delivery.listeners if not new.listeners[e.index].removed]
            cannot = self._delivery.cannot_share([*remaining, *added])
        if cannot is not None and canary:
            return f"no canary: {cannot}"
        if cannot is None and policy.finish_alone:
            # The running workers, too, must be able to retire while other workers accept.
            workers = [each for each in self._pool.records() if not each.asked_to_exit]
            cannot = None if all(each.retires for each in workers) else NO_LIBRARY
        return cannot

    def _put_in_force(self, settings: Settings) -> None:
        before = self.settings.listeners
        self.record = SettingsRecord(settings)
        self._pool.apply_settings(settings)
        self._remove_listeners(before)

    def _remove_listeners(self, before: Sequence[ListenerSettings]) -> None:
        """Remove the listeners that the settings in force mark as removed.

        before: the listeners of the settings that were in force until now.  A listener that they
        mark as removed was reported by an earlier program, which we have replaced.
        """
        configured = self.settings.listeners
        reported = {index for index, each in enumerate(before) if each.removed}
        # Keep the listeners that only candidate settings have: `configured` lacks their indices.
        for listener in self._delivery.listeners:
            if listener.index < len(configured) and configured[listener.index].removed:
                if listener.index not in reported:
                    address = listener.settings.address
                    self._log.write("info", "listener-removed", address=address)
                self._delivery.remove(listener)


def _with_file(settings: Settings, index: int, bound: ListenerSettings) -> Settings:
    """Return a copy of the settings; its listener at `index` has the socket file of `bound`."""
    found = list(settings.listeners)
    if index < len(found):
        found[index] = replace(
            found[index], device=bound.device, inode=bound.inode, beside=bound.beside
        )
    return replace(settings, listeners=tuple(found))
