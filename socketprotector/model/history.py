"""The history: which reloads there were, and which workers crashed.

Pure: frozen values, kept in the state like everything else that has to outlive the program.
Times are seconds since the epoch, for people.
"""

from __future__ import annotations

from dataclasses import replace

from .lazy_dataclass import frozen

#: The last so many are remembered.
RELOADS, CRASHES = 10, 20


@frozen
class Reload:
    """One that was tried; the generation is the one that it started."""

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
    """The last of both, the newest last."""

    reloads: tuple[Reload, ...] = ()
    crashes: tuple[Crash, ...] = ()
    crashed: int = 0  # in all
    dry_run: Reload | None = None  # the last one; then passed or failed

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
        """Note that one is under way, in the place of the last one."""
        return replace(self, dry_run=Reload(generation, began_at=at))

    def dry_run_ended(self, generation: int, result: str, reason: str, at: float) -> History:
        """Note its result, `passed` or `failed`, and why."""
        began_at = self.dry_run.began_at if self.dry_run is not None else at
        return replace(self, dry_run=Reload(generation, result, reason, began_at, at))

    def reload_began(self, generation: int, at: float) -> History:
        """Note that one is under way; of the last RELOADS it is the latest."""
        begun = Reload(generation, began_at=at)
        return replace(self, reloads=(*self.reloads, begun)[-RELOADS:])

    def reload_ended(self, generation: int, result: str, reason: str, at: float) -> History:
        """Note the outcome, also of a reload whose beginning was not recorded."""
        others = tuple(each for each in self.reloads if each.generation != generation)
        begun = next((each for each in self.reloads if each.generation == generation), None)
        ended = replace(
            begun or Reload(generation, began_at=at), result=result, reason=reason, ended_at=at
        )
        return replace(self, reloads=(*others, ended)[-RELOADS:])
