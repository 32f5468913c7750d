"""The history: reloads, dry runs, changes of health, and crashes of workers.

Pure: frozen values, kept in the state because they must outlive the program.
Times are seconds since the epoch, for people.  The history of releases: model/release.py.
"""

from __future__ import annotations

from .lazy_dataclass import as_dict, frozen, replace
from .text import headline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The number of last entries that are kept.
RELOADS, DRY_RUNS, HEALTH_CHANGES, CRASHES = 50, 20, 50, 20
#: The last reloads and dry runs whose last words are kept, too; `status` shows these.
RECENT = 10
HEALTHY = "healthy"


@frozen
class Reload:
    """A reload or a dry run: the generation that it started, and its result."""

    generation: int
    result: str = "running"  # later reloaded or failed
    reason: str = ""
    began_at: float = 0.0
    ended_at: float | None = None


@frozen
class Crash:
    """A worker that exited without a request, or with an error."""

    at: float
    generation: int
    worker: int
    slot: int
    pid: int
    how: str
    when: str  # starting, serving or draining
    lost: int | None = None  # connections that were open in the worker; None: not counted
    last_words: str = ""
    cpu_s: float | None = None
    max_rss_kib: int | None = None


@frozen
class History:
    """The last entries of each kind, the newest last."""

    reloads: tuple[Reload, ...] = ()
    crashes: tuple[Crash, ...] = ()
    crashed: int = 0  # the number of all crashes
    dry_run: Reload | None = None  # the last dry run; its result becomes passed or failed
    earlier_dry_runs: tuple[Reload, ...] = ()
    #: Generations that became healthy, unhealthy or unknown; the reason is the last answer.
    health: tuple[Reload, ...] = ()  # of class Reload, because older versions know no other

    def with_crash(self, crash: Crash) -> History:
        """Return the history with a crash added; a dry run's crash is in its verdict instead."""
        if self.dry_run is not None and self.dry_run.generation == crash.generation:
            return self
        return replace(self, crashes=(*self.crashes, crash)[-CRASHES:], crashed=self.crashed + 1)

    def with_last_words(self, worker: int, pid: int, last_words: str) -> History:
        """Return the history with the last words of a crashed worker, which were read later."""
        crashes = (
            replace(each, last_words=last_words)
            if (each.worker, each.pid) == (worker, pid)
            else each
            for each in self.crashes
        )
        return replace(self, crashes=tuple(crashes))

    def dry_run_began(self, generation: int, at: float) -> History:
        """Return the history with a new dry run; the previous dry run moves to earlier_dry_runs."""
        earlier = (*self.earlier_dry_runs, *([self.dry_run] if self.dry_run else []))
        begun = Reload(generation, began_at=at)
        return replace(self, dry_run=begun, earlier_dry_runs=_last(earlier, DRY_RUNS - 1))

    def dry_run_ended(self, generation: int, result: str, reason: str, at: float) -> History:
        """Return the history with a dry run's result, `passed` or `failed`, and its reason."""
        began_at = self.dry_run.began_at if self.dry_run is not None else at
        return replace(self, dry_run=Reload(generation, result, reason, began_at, at))

    def reload_began(self, generation: int, at: float) -> History:
        """Return the history with a reload that begins."""
        begun = Reload(generation, began_at=at)
        return replace(self, reloads=_last((*self.reloads, begun), RELOADS))

    def reload_begins_again(self, generation: int) -> History:
        """Return the history without a reload's first generation; another generation follows."""
        others = (each for each in self.reloads if each.generation != generation)
        return replace(self, reloads=tuple(others))

    def reload_ended(self, generation: int, result: str, reason: str, at: float) -> History:
        """Return the history with a reload's result, even if its beginning was not recorded."""
        others = tuple(each for each in self.reloads if each.generation != generation)
        begun = next((each for each in self.reloads if each.generation == generation), None)
        ended = replace(
            begun or Reload(generation, began_at=at), result=result, reason=reason, ended_at=at
        )
        return replace(self, reloads=_last((*others, ended), RELOADS))

    def health_changed(self, generation: int, state: str, reason: str, at: float) -> History:
        """Return the history with a health check's result, if it differs from the last result.

        A generation counts as healthy until a check fails.  After a restart of the protector the
        first result often repeats the recorded result.
        """
        last = self.health[-1] if self.health else None
        known = last.result if last is not None and last.generation == generation else HEALTHY
        if state == known:
            return self
        change = Reload(generation, state, reason, began_at=at, ended_at=at)
        return replace(self, health=(*self.health, change)[-HEALTH_CHANGES:])

    def entries(self) -> list[dict[str, Any]]:
        """Return reloads, dry runs and changes of health as dicts, ordered by when they began."""
        dry_runs = (*self.earlier_dry_runs, *([self.dry_run] if self.dry_run else []))
        found = [_entry("reload", each) for each in self.reloads]
        found += [_entry("dry-run", each) for each in dry_runs]
        found += [_entry("health", each) for each in self.health]
        return sorted(found, key=lambda each: each["began_at"])


def _entry(kind: str, each: Reload) -> dict[str, Any]:
    return {"kind": kind, **as_dict(each)}


def _last(reloads: tuple[Reload, ...], most: int) -> tuple[Reload, ...]:
    """Return the last `most` reloads; only the last RECENT keep more than a reason's first line."""
    kept = reloads[-most:]
    older = (
        replace(each, reason=headline(each.reason)) if "\n" in each.reason else each
        for each in kept[:-RECENT]
    )
    return (*older, *kept[-RECENT:])
