"""What follows from an answer: before a generation has clients, as it settles, as it serves."""

from __future__ import annotations

from itertools import product

import pytest

from socketprotector.daemon import verdicts
from socketprotector.daemon.verdicts import (
    BAD,
    CANNOT,
    GOOD,
    INCONCLUSIVE_S,
    MOVED,
    NO_TARGET,
    REFUSED,
    UNHEALTHY,
    UNKNOWN,
    UNMADE,
    UNREACHED,
    UNTAKEN,
    Serving,
    Settling,
    Verdict,
)
from socketprotector.model.history import HEALTHY

KINDS = (GOOD, BAD, REFUSED, UNREACHED, UNMADE, UNTAKEN, CANNOT, NO_TARGET, MOVED)
#: How many answers in a row make another state of it.
MOST = 2


def serving(*kinds: str) -> Serving:
    known = Serving(0.0)
    for at, kind in enumerate(kinds, 1):
        known = known.after(Verdict(kind, "" if kind == GOOD else f"why {kind}"), MOST, float(at))
    return known


# -- before it has clients ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_timer_may_decide_where_no_worker_can_have_caused_it_and_only_under_any(
    kind: str,
) -> None:
    verdict = Verdict(kind)
    may_be_ready = kind in (REFUSED, UNREACHED, UNMADE, NO_TARGET)

    assert verdicts.timer_may_decide("any", verdict) == may_be_ready
    for ready in ("accept", "http", "https"):
        assert not verdicts.timer_may_decide(ready, verdict)


def test_the_pause_is_a_tenth_of_the_time_that_it_has_taken() -> None:
    pauses = [verdicts.pause_s(seconds) for seconds in (0.0, 0.5, 2.0, 10.0, 100.0)]

    assert pauses == [0.05, 0.05, 0.2, 1.0, 1.0]


# -- while it settles --------------------------------------------------------------


@pytest.mark.parametrize("kind", [BAD, REFUSED, UNMADE, UNTAKEN, NO_TARGET])
@pytest.mark.parametrize("first", [(), (GOOD,), (CANNOT,)])
def test_the_first_bad_answer_of_one_that_settles_is_the_last(
    kind: str, first: tuple[str, ...]
) -> None:
    known = Settling()
    for each in first:
        known = known.after(Verdict(each), 0.0, 0.0)

    assert not known.bad
    assert known.after(Verdict(kind, "why"), 1.0, 1.0).bad == "why"


@pytest.mark.parametrize("kind", [CANNOT, UNREACHED, MOVED])
def test_what_nothing_is_known_of_for_too_long_is_as_bad(kind: str) -> None:
    known, verdict = Settling(), Verdict(kind, "why")
    known = known.after(verdict, 5.0, 6.0)
    assert (known.bad, known.pause_s(1.0)) == ("", 0.25)

    # Its time begins with the question, and ends with a good answer.
    assert not known.after(verdict, 14.0, 4.9 + INCONCLUSIVE_S).bad
    assert known.after(verdict, 14.0, 5.0 + INCONCLUSIVE_S).bad == "why"
    good = known.after(Verdict(GOOD), 14.0, 14.0)
    assert good.pause_s(1.0) == 1.0
    assert not good.after(verdict, 15.0, 15.0 + INCONCLUSIVE_S - 0.1).bad


def test_what_takes_that_long_by_itself_is_bad_at_once() -> None:
    assert Settling().after(Verdict(CANNOT, "hangs"), 0.0, INCONCLUSIVE_S).bad == "hangs"


def test_one_whose_time_is_over_awaits_an_answer_from_then_on() -> None:
    before = Settling().after(Verdict(GOOD), 1.0, 1.0)
    assert before.is_good

    over = before.after_settle_time()
    assert (over.is_over, over.is_good) == (True, False)
    unknown = over.after(Verdict(MOVED), 2.0, 2.0)
    assert not unknown.after_settle_time().is_good
    after = unknown.after(Verdict(GOOD), 3.0, 3.0)

    assert after.after_settle_time() == after
    assert after.is_good


# -- while it serves ---------------------------------------------------------------


def test_one_that_begins_is_known_after_one_good_answer() -> None:
    assert serving().state == UNKNOWN
    assert serving(GOOD) == Serving(1.0, HEALTHY, answered_at=1.0)
    assert serving(GOOD, GOOD).since_at == 1.0


@pytest.mark.parametrize("kind", [BAD, REFUSED])
def test_bad_answers_in_a_row_are_counted(kind: str) -> None:
    once = serving(GOOD, kind)
    assert (once.state, once.failures, once.last) == (HEALTHY, 1, f"why {kind}")

    twice = serving(GOOD, kind, kind)
    assert (twice.state, twice.since_at, twice.failures) == (UNHEALTHY, 3.0, 2)

    again = serving(GOOD, kind, kind, GOOD)
    assert (again.state, again.failures, again.reason, again.last) == (HEALTHY, 0, "", "")


@pytest.mark.parametrize("kind", [UNMADE, UNTAKEN])
def test_a_question_that_waits_changes_no_state_and_no_count(kind: str) -> None:
    known = serving(BAD, kind, kind, kind)

    assert (known.state, known.failures, known.answered_at) == (UNKNOWN, 1, 1.0)
    assert known.last == "busy: no worker has accepted the probe yet"
    assert known.reason == "why bad"
    assert serving(BAD, kind, BAD).state == UNHEALTHY


@pytest.mark.parametrize("kind", [CANNOT, UNREACHED, NO_TARGET, MOVED])
def test_what_cannot_be_asked_in_a_row_makes_it_unknown(kind: str) -> None:
    assert serving(GOOD, kind).state == HEALTHY

    known = serving(GOOD, kind, kind)

    assert (known.state, known.last) == (UNKNOWN, f"not probed: why {kind}")
    assert (known.answered_at, known.failures) == (1.0, 0)


@pytest.mark.parametrize("answer", [GOOD, BAD, UNTAKEN])
def test_only_in_a_row(answer: str) -> None:
    assert serving(GOOD, CANNOT, answer, CANNOT).state == HEALTHY


def test_of_each_sequence_of_five_the_state_is_that_of_its_last_answers() -> None:
    for kinds in product((GOOD, BAD, UNTAKEN, CANNOT), repeat=5):
        state, failures, missed = UNKNOWN, 0, 0
        for kind in kinds:
            failures = 0 if kind == GOOD else failures + (kind == BAD)
            missed = missed + 1 if kind == CANNOT else 0
            if kind == GOOD:
                state = HEALTHY
            elif kind == BAD and failures >= MOST:
                state = UNHEALTHY
            elif missed >= MOST:
                state = UNKNOWN
        known = serving(*kinds)
        assert (known.state, known.failures, known.missed) == (state, failures, missed), kinds
