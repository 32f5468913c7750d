"""The verdicts of a probe, and what follows from them in each phase of a generation.

Pure: no socket, no clock.  probe.py sends the probes; ready_probe.py, settle_check.py and health.py
act on the verdicts.
"""

from __future__ import annotations

from ..model.history import HEALTHY
from ..model.lazy_dataclass import frozen, replace

#: GOOD: a good answer; for an accept probe, a worker has accepted.
#: BAD: a bad answer, no answer in time, or an HTTP probe's connection failed after connect().
GOOD, BAD = "good", "bad"
#: REFUSED: no process listens, or an accept probe's connection failed after connect().
#: UNREACHED: connect() failed at once for another reason.
REFUSED, UNREACHED = "refused", "unreached"
#: UNMADE: not connected in time, for example because the backlog is full.  UNTAKEN: connected, but
#: not accepted.
UNMADE, UNTAKEN = "unmade", "untaken"
#: The probe could not be carried out, for example because no descriptor was free.
CANNOT = "cannot"
#: No socket leads to this generation alone, or the probed listener does not exist.
NO_TARGET = "no-target"
#: The probed socket was shut down, closed to clients or replaced during the probe, so another
#: generation may have answered.
MOVED = "moved"

#: The pause before the next probe: a tenth of the time since the first probe, within these limits.
_FIRST_PAUSE_S, _LAST_PAUSE_S, _PAUSE_SHARE = 0.05, 1.0, 0.1
#: The pause after an inconclusive verdict (_INCONCLUSIVE) about a settling generation.
_AGAIN_S = 0.25
#: A settling generation fails when all verdicts have been inconclusive for this long.
INCONCLUSIVE_S = 10.0


@frozen
class Verdict:
    """The result of one probe."""

    kind: str
    why: str = ""  # the reason, for messages


def pause_s(since_first_s: float) -> float:
    """Return the pause before the next probe."""
    return min(max(_FIRST_PAUSE_S, _PAUSE_SHARE * since_first_s), _LAST_PAUSE_S)


# -- a starting generation ---------------------------------------------------------

#: The generation may be ready in spite of these verdicts.
_MAYBE_READY = (REFUSED, UNREACHED, UNMADE, NO_TARGET)


def timer_may_decide(ready: str, verdict: Verdict) -> bool:
    """Return whether, after this verdict, a timer may make the generation ready.

    ready: the kind of --ready; "any": the default of --handoff listener.
    """
    return ready == "any" and verdict.kind in _MAYBE_READY


# -- a settling generation ---------------------------------------------------------

#: These verdicts say nothing about a settling generation: they are inconclusive.
_INCONCLUSIVE = (CANNOT, UNREACHED, MOVED)


@frozen
class Settling:
    """The results of a settling generation's probes.

    The generation fails at the first verdict that is neither good nor inconclusive.  We do not
    wait for a second such verdict, because more clients would fail meanwhile.  The generation also
    fails if all verdicts are inconclusive for INCONCLUSIVE_S.
    """

    is_over: bool = False  # the time of --settle has passed
    #: Whether a good answer has come.  If is_over is True, only answers after the time of --settle
    #: count.
    is_good: bool = False
    #: The send time of the first inconclusive probe after the last GOOD verdict; None: none.
    inconclusive_since: float | None = None
    bad: str = ""  # why the generation fails

    def after_settle_time(self) -> Settling:
        """Return the state after the time of --settle: only later good answers count."""
        return self if self.is_over else replace(self, is_over=True, is_good=False)

    def after(self, verdict: Verdict, sent_at: float, now: float) -> Settling:
        """Return the state after a verdict; sent_at: when the verdict's probe was sent."""
        if verdict.kind == GOOD:
            return replace(self, is_good=True, inconclusive_since=None)
        since = sent_at if self.inconclusive_since is None else self.inconclusive_since
        if verdict.kind in _INCONCLUSIVE and now - since < INCONCLUSIVE_S:
            return replace(self, inconclusive_since=since)
        return replace(self, bad=verdict.why)

    def pause_s(self, usual_s: float) -> float:
        """Return the pause before the next probe; usual_s: the pause after a good answer."""
        return usual_s if self.inconclusive_since is None else _AGAIN_S


# -- the serving generation --------------------------------------------------------

UNKNOWN, UNHEALTHY = "unknown", "unhealthy"


@frozen
class Serving:
    """The results of the serving generation's health probes."""

    since_at: float  # when `state` changed last
    state: str = UNKNOWN
    #: The last probe's result, in words; "": a good answer, or no probe yet.
    last: str = ""
    #: How many verdicts were BAD or REFUSED since the last GOOD verdict, and the latest reason.
    failures: int = 0
    reason: str = ""
    answered_at: float | None = None  # when the last verdict GOOD, BAD or REFUSED came
    missed: int = 0  # how many verdicts in a row were inconclusive (see after())

    def after(self, verdict: Verdict, most: int, at: float) -> Serving:
        """Return the state after a verdict.

        most: the limit for each of the following two counts.  When the number of BAD or REFUSED
        verdicts since the last GOOD verdict reaches `most`, the state becomes UNHEALTHY.  When the
        number of inconclusive verdicts in a row reaches `most`, the state becomes UNKNOWN.
        Here inconclusive verdicts (`case _`) are _INCONCLUSIVE and NO_TARGET.
        """
        state, why = self.state, verdict.why
        failures, missed, reason = self.failures, 0, self.reason
        answered_at: float | None = at
        match verdict.kind:
            case "good":
                state, failures, reason = HEALTHY, 0, ""
            case "bad" | "refused":
                failures, reason = failures + 1, why
                state = UNHEALTHY if failures >= most else state
            case "unmade" | "untaken":
                # Not a failure: workers may be busy.  The next probe reuses the connection, or
                # connects again if a full UNIX backlog prevented the connection.
                why, answered_at = "busy: no worker has accepted the probe yet", self.answered_at
            case _:
                why, missed, answered_at = f"not probed: {why}", self.missed + 1, self.answered_at
                state = UNKNOWN if missed >= most else state
        since_at = self.since_at if state == self.state else at
        return Serving(since_at, state, why, failures, reason, answered_at, missed)
