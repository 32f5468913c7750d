"""Where workers accept: clients that wait where none does come before a requested reload.

Pure.  Of a failed release, or of a hold: the last good command accepts them.
"""

from __future__ import annotations

from ..model.lazy_dataclass import replace
from .actions import Report, ReportKind
from .fleet import Fleet, Next, Phase
from .reload import call_off_dry_run, has_failed, renew, take_back
from .step import Step

#: What becomes of a generation that starts or settles when clients of a hold wait.
HELD_FIRST = "called off: clients of the hold that ended come first"
#: What becomes of a release that is yet to be opened when clients wait where none accepts.
STRANDED_FIRST = "called off: clients that wait where no worker accepts come first"
#: Why another one of the last good command serves for good, which settles.
SETTLED_BY_HOLD = "before --settle was over: clients of a hold wait"


def rescue(step: Step, number: int) -> None:
    """Open the last good command to accept clients that an ended generation has left.

    One of a failed release; of another, only before a release that would get them.  Where that
    command fails, too, Stranded comes, less and less often.
    """
    fleet, its = step.fleet, step.fleet.generation(number)
    if (its is not None and its.workers) or not fleet.policy.has_two_places:
        return
    if its is not None and its.fresh and has_failed(fleet, its):
        renew(step)
    elif _is_unopened(fleet):
        serve_stranded(step)


def serve_held(step: Step) -> None:
    """Open the last good command to accept held clients; a reload under way restarts.

    There is no third socket for it beside the serving and the incoming generation.  Where that one
    starts for other clients that wait, these come first.
    """
    serving, incoming = step.fleet.of(Phase.SERVING), step.fleet.incoming
    if not serving or not incoming or step.fleet.stop_requested:
        return
    if incoming.phase is Phase.STARTING and not incoming.fresh:
        return
    if step.fleet.dry_run:
        call_off_dry_run(step, HELD_FIRST)
    elif not incoming.fresh:
        step.promote(incoming.number, SETTLED_BY_HOLD)
    else:
        take_back(step, incoming)
        step.do(Report(ReportKind.RETRYING, incoming.number, HELD_FIRST))
        step.fleet = replace(step.fleet, reload_wanted=True)
    renew(step)


def serve_stranded(step: Step) -> None:
    """Open the last good command to accept clients that wait where no worker accepts.

    A release that is yet to be opened would get them before it is ready, and lose them if it fails.
    """
    fleet = step.fleet
    if _is_unopened(fleet) and fleet.of(Phase.SERVING) and not fleet.stop_requested:
        if fleet.dry_run:
            call_off_dry_run(step, STRANDED_FIRST)
        else:
            step.forget_settings()
            step.do(Report(ReportKind.RETRYING, fleet.next_generation, STRANDED_FIRST))
            step.fleet = replace(step.fleet, to_open=None, reload_wanted=True)
    renew(step)


def _is_unopened(fleet: Fleet) -> bool:
    """Whether a reload or a dry run has begun, and its release is yet to be opened."""
    comes = fleet.reading or fleet.candidate or fleet.to_open is Next.FRESH
    return bool(comes and not fleet.incoming)
