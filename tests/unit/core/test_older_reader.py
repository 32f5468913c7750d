"""Which classes and values may be in a state: an older program ignores only unknown fields.

A guard or systemd may start an older program after a kill, and an upgrade may be to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

from socketprotector.core.snapshot import Snapshot
from socketprotector.model import settings

#: Fields that were added since, each with what older programs do not know.
ADDED = {"Fleet.rollout"}
#: Classes and values that all programs know which read format 3.
KNOWN = """
Candidate Counts Crash Deadline Fleet ForwarderRecord Generation GenerationRecord History HoldRecord
LameDuck.off LameDuck.on LameDuck.stopping Next.fresh Next.last-good Phase.abandoned
Phase.draining Phase.serving Phase.settling Phase.starting Program Reload Report
ReportKind.channel-broken ReportKind.dry-run ReportKind.dry-run-failed ReportKind.dry-run-passed
ReportKind.exited ReportKind.held ReportKind.lame-duck ReportKind.lame-duck-off
ReportKind.lame-duck-on ReportKind.many-draining ReportKind.ready ReportKind.recovered
ReportKind.refused ReportKind.released ReportKind.reload-failed ReportKind.reloaded
ReportKind.reloading ReportKind.replacing ReportKind.retrying ReportKind.scaled
ReportKind.start-failed ReportKind.stopping Retire RunRecord
SettingsRecord Signal Snapshot State.orphaned State.ready State.retiring State.starting
State.waiting SteeringRecord Stop.graceful Stop.quick TimerKind.drain TimerKind.hold
TimerKind.kill TimerKind.lame-duck TimerKind.lame-duck-idle TimerKind.open TimerKind.settle
TimerKind.start TimerKind.stop TimerKind.turn TimerKind.worker-kill TimerKind.worker-respawn
TimerKind.worker-retire TimerKind.worker-start UseSettings Worker WorkerRecord WorkerSignal.ABRT
WorkerSignal.KILL WorkerSignal.TERM
"""


def found_in(kind: Any, seen: set[Any]) -> Iterator[str]:
    """Yield the names of classes and values that may be in a state, where older programs look."""
    for each in get_args(kind):
        yield from found_in(each, seen)
    if not isinstance(kind, type) or kind in seen or kind in settings.CLASSES:
        return  # settings that it does not know it refuses in words
    seen.add(kind)
    if issubclass(kind, Enum):
        yield from (f"{kind.__name__}.{each.value}".replace(" ", "-") for each in kind)
    elif is_dataclass(kind):
        yield kind.__name__
        for name, inside in get_type_hints(kind).items():
            if f"{kind.__name__}.{name}" not in ADDED:
                yield from found_in(inside, seen)


def test_an_older_program_and_this_one_can_read_each_other_s_older_fields() -> None:
    """What is no longer found here, this program could not read from an older one."""
    assert {*found_in(Snapshot, set())} == {*KNOWN.split()}
