"""The history: reloads and dry runs, how health checks of --health went, and workers that crashed.

Pure: frozen values, kept in the state like everything else that has to outlive the program.
Times are seconds since the epoch, for people.
"""

from __future__ import annotations

from .lazy_dataclass import as_dict, frozen, replace
from .text import headline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The last so many are remembered.
RELOADS, DRY_RUNS, HEALTH_CHANGES, CRASHES = 50, 20, 50, 20
#: Of the last so many reloads, and dry runs, last words are remembered, too; `status` has these.
RECENT = 10
HEALTHY = "healthy"


@frozen
class Reload:
    """A release that was tried, with the generation that it started."""

    generation: int
    result: str = "running"  # then reloaded or failed
    reason: str = ""
    began_at: float = 0.0
    ended_at: float | None = None


@frozen
class Crash:
    """A worker that ended without being asked to, or badly."""

    at: float
    generation: int
    worker: int
    slot: int
    pid: int
    how: str
    when: str  # starting, serving or draining
    lost: int | None = None  # connections that were open in it, where it has counted
    last_words: str = ""
    cpu_s: float | None = None
    max_rss_kib: int | None = None


@frozen
class History:
    """The last of each, the newest last."""

    reloads: tuple[Reload, ...] = ()
    crashes: tuple[Crash, ...] = ()
    crashed: int = 0  # in all
    dry_run: Reload | None = None  # the last one; then passed or failed
    earlier_dry_runs: tuple[Reload, ...] = ()
    #: A generation that became healthy, unhealthy or unknown; the reason is the last answer.
    health: tuple[Reload, ...] = ()  # written as reloads are: an older program knows no other class

    def with_crash(self, crash: Crash) -> History:
        """Add one; not what a dry run finds out, which is in its verdict: nothing served there."""
        if self.dry_run is not None and self.dry_run.generation == crash.generation:
            return self
        return replace(self, crashes=(*self.crashes, crash)[-CRASHES:], crashed=self.crashed + 1)

    def with_last_words(self, worker: int, last_words: str) -> History:
        """Add what a worker that has crashed turned out to have said."""
        crashes = (
            replace(each, last_words=last_words) if each.worker == worker else each
            for each in self.crashes
        )
        return replace(self, crashes=tuple(crashes))

    def dry_run_began(self, generation: int, at: float) -> History:
        """Note that one is under way; the one before is an earlier one from now on."""
        earlier = (*self.earlier_dry_runs, *([self.dry_run] if self.dry_run else []))
        begun = Reload(generation, began_at=at)
        return replace(self, dry_run=begun, earlier_dry_runs=_last(earlier, DRY_RUNS - 1))

    def dry_run_ended(self, generation: int, result: str, reason: str, at: float) -> History:
        """Note its result, `passed` or `failed`, and why."""
        began_at = self.dry_run.began_at if self.dry_run is not None else at
        return replace(self, dry_run=Reload(generation, result, reason, began_at, at))

    def reload_began(self, generation: int, at: float) -> History:
        """Note that one is under way; of the last RELOADS it is the latest."""
        begun = Reload(generation, began_at=at)
        return replace(self, reloads=_last((*self.reloads, begun), RELOADS))

    def reload_begins_again(self, generation: int) -> History:
        """Forget the generation that it began with, if it is one."""
        others = (each for each in self.reloads if each.generation != generation)
        return replace(self, reloads=tuple(others))

    def reload_ended(self, generation: int, result: str, reason: str, at: float) -> History:
        """Note the outcome, also of a reload whose beginning was not recorded."""
        others = tuple(each for each in self.reloads if each.generation != generation)
        begun = next((each for each in self.reloads if each.generation == generation), None)
        ended = replace(
            begun or Reload(generation, began_at=at), result=result, reason=reason, ended_at=at
        )
        return replace(self, reloads=_last((*others, ended), RELOADS))

    def health_changed(self, generation: int, state: str, reason: str, at: float) -> History:
        """Note what the health check found, where that is news.

        A generation counts as healthy until a check says otherwise.  The program after a restart
        finds out again what is known already.
        """
        last = self.health[-1] if self.health else None
        known = last.result if last is not None and last.generation == generation else HEALTHY
        if state == known:
            return self
        change = Reload(generation, state, reason, began_at=at, ended_at=at)
        return replace(self, health=(*self.health, change)[-HEALTH_CHANGES:])

    def entries(self) -> list[dict[str, Any]]:
        """Return reloads, dry runs and changes of health in one form, by the time they began."""
        dry_runs = (*self.earlier_dry_runs, *([self.dry_run] if self.dry_run else []))
        found = [_entry("reload", each) for each in self.reloads]
        found += [_entry("dry-run", each) for each in dry_runs]
        found += [_entry("health", each) for each in self.health]
        return sorted(found, key=lambda each: each["began_at"])


def _entry(kind: str, each: Reload) -> dict[str, Any]:
    return {"kind": kind, **as_dict(each)}


def _last(reloads: tuple[Reload, ...], most: int) -> tuple[Reload, ...]:
    """Return the last ones; of those before RECENT only the first line of the reason."""
    kept = reloads[-most:]
    older = (
        replace(each, reason=headline(each.reason)) if "\n" in each.reason else each
        for each in kept[:-RECENT]
    )
    return (*older, *kept[-RECENT:])
