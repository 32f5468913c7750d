"""What may come of a question, and what follows from it at each time of a generation's life.

Pure: no socket, no clock.  probe.py asks; asking.py, settle_check.py and health.py carry out what
is decided here.
"""

from __future__ import annotations

from ..model.history import HEALTHY
from ..model.lazy_dataclass import frozen, replace

#: A good answer; a bad one, or none in time.
GOOD, BAD = "good", "bad"
#: Nothing listens, or what listened has reset it; it cannot be connected to for another reason.
REFUSED, UNREACHED = "refused", "unreached"
#: It was not connected in time, as where a backlog is full; it was, and no worker has taken it.
UNMADE, UNTAKEN = "unmade", "untaken"
#: Something of ours was missing: a descriptor, a process.
CANNOT = "cannot"
#: There is no socket by which this generation alone is reached.
NO_TARGET = "no-way"
#: The asked socket was shut down meanwhile: another generation may have answered.
MOVED = "moved"

#: Before the next question: a tenth of the time since the first one, from here to there.
_FIRST_PAUSE_S, _LAST_PAUSE_S, _PAUSE_SHARE = 0.05, 1.0, 0.1
#: Before the next one where nothing is known of the last; for how long that may go on.
_AGAIN_S = 0.25
UNKNOWN_S = 10.0


@frozen
class Verdict:
    """What came of one question."""

    kind: str
    why: str = ""  # for people


def pause_s(since_first_s: float) -> float:
    """Return how long to wait for the next question."""
    return min(max(_FIRST_PAUSE_S, _PAUSE_SHARE * since_first_s), _LAST_PAUSE_S)


# -- before it has clients ---------------------------------------------------------

#: No worker's doing: it may be ready nevertheless.
_TELLS_NOTHING = (REFUSED, UNREACHED, UNMADE, NO_TARGET)


def time_tells(ready: str, verdict: Verdict) -> bool:
    """Say whether time is to tell that a generation is ready; ready: the kind of --ready."""
    return ready == "any" and verdict.kind in _TELLS_NOTHING


# -- while it settles --------------------------------------------------------------

#: Of these nothing is known of the generation.
_UNKNOWN = (CANNOT, UNREACHED, MOVED)


@frozen
class Settling:
    """What is known of a generation that settles.

    The first bad answer is the last: who asks twice before going back has clients fail meanwhile.
    What cannot be asked for as long as an answer may take is as bad.
    """

    is_over: bool = False  # the time of --settle is
    is_good: bool = False  # a good answer has come since
    unknown_since: float | None = None
    bad: str = ""  # why it must not go on

    def over(self) -> Settling:
        """Return the same once --settle is over: from then on one good answer is awaited."""
        return self if self.is_over else replace(self, is_over=True, is_good=False)

    def after(self, verdict: Verdict, asked_at: float, now: float) -> Settling:
        """Return what is known now."""
        if verdict.kind == GOOD:
            return replace(self, is_good=True, unknown_since=None)
        since = asked_at if self.unknown_since is None else self.unknown_since
        if verdict.kind in _UNKNOWN and now - since < UNKNOWN_S:
            return replace(self, unknown_since=since)
        return replace(self, bad=verdict.why)

    def pause_s(self, usual_s: float) -> float:
        """Return how long to wait for the next question; usual_s: after a good answer."""
        return usual_s if self.unknown_since is None else _AGAIN_S


# -- while it serves ---------------------------------------------------------------

UNKNOWN, UNHEALTHY = "unknown", "unhealthy"


@frozen
class Serving:
    """What is known of the generation that new clients come to: of one that has begun, nothing."""

    since_at: float
    state: str = UNKNOWN
    #: What came of the last question, in words; "": a good answer, or none was asked yet.
    last: str = ""
    #: How many answers were bad, since the last good one, and the last of them.
    failures: int = 0
    reason: str = ""
    answered_at: float | None = None
    missed: int = 0  # how often it could not be asked, in a row

    def after(self, verdict: Verdict, most: int, at: float) -> Serving:
        """Return what is known now; most: so many in a row make another state of it."""
        state, why = self.state, verdict.why
        failures, missed, reason = self.failures, 0, self.reason
        answered_at: float | None = at
        match verdict.kind:
            case "good":
                state, failures, reason = HEALTHY, 0, ""
            case "bad" | "refused":
                failures, reason = failures + 1, why
                state = UNHEALTHY if failures >= most else state
            case "unmade" | "untaken":  # as long as it stays so, no other is sent
                why, answered_at = "busy: no worker has taken the question yet", self.answered_at
            case _:
                why, missed, answered_at = f"not asked: {why}", self.missed + 1, self.answered_at
                state = UNKNOWN if missed >= most else state
        since_at = self.since_at if state == self.state else at
        return Serving(since_at, state, why, failures, reason, answered_at, missed)
