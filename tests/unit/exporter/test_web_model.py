"""How statuses and events become what the page shows: no socket, no clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from socketprotector_exporter.web_model import CELLS, ENDING_LANES, Instance
from socketprotector_exporter.web_series import POINTS, STEP_S, History
from socketprotector_exporter.web_text import event_line, words_of

from tests.rounds import rounds
from tests.unit.ctl.fake import (
    awaited,
    canary,
    generation,
    listener,
    reload,
    rolling,
    status,
    worker,
)

BEGAN = 1_000_000_000.0


def waited(**counts: int) -> dict[str, Any]:
    buckets = [0] * 32
    for place, count in counts.items():
        buckets[int(place[1:])] = count
    return {"count": sum(buckets), "p50": 1, "p99": 1, "buckets": buckets}


class Seen:
    """An instance that is seen each second."""

    def __init__(self) -> None:
        self.instance = Instance("/run/socketprotector/web.control")
        self.at = 0.0

    def see(self, told: dict[str, Any], after_s: float = 1.0) -> dict[str, Any]:
        self.at += after_s
        self.instance.see(told, self.at, BEGAN + self.at)
        return self.shown

    @property
    def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(self.instance.shown(), allow_nan=False))
        return found

    def lane(self, number: int) -> dict[str, Any]:
        [found] = [each for each in self.shown["lanes"] if each["number"] == number]
        assert isinstance(found, dict)
        return found


@pytest.fixture
def seen() -> Seen:
    return Seen()


def test_before_the_first_answer_there_is_a_reason_and_nothing_else(seen: Seen) -> None:
    assert set(seen.shown) == {"id", "name", "why"}
    assert seen.shown["why"] == "connecting"


def test_a_status_becomes_a_card(seen: Seen) -> None:
    shown = seen.see(
        status(
            generation(7, "draining", worker(1), active=2, draining_since_at=150.0),
            generation(8, "serving", worker(2), worker(3, state="starting"), active=5, queue=4),
            restarts=2,
            crashes=3,
        )
    )

    assert (shown["phase"], shown["restarts"], shown["crashes"]) == ("serving", 2, 3)
    assert (shown["active"], shown["queue"], shown["limit"], shown["backlog"]) == (7, 4, 278, 3)
    assert shown["listens"] == ["tcp:0.0.0.0:4321"]
    assert [lane["number"] for lane in shown["lanes"]] == [8, 7]  # the newest on top
    assert (seen.lane(8)["ready"], seen.lane(8)["size"]) == (1, 2)
    assert seen.lane(8)["workers"][1] == [3, 4712, "starting", 1, ""]
    assert seen.lane(7)["since"] == 150.0


def test_forked_children_have_cells_behind_their_worker(seen: Seen) -> None:
    child = {"number": 0, "pid": 4713, "active": 2}
    seen.see(status(generation(8, "serving", worker(2, processes=[child]), worker(3))))

    lane = seen.lane(8)
    assert lane["size"] == 2
    assert [each[:4] for each in lane["workers"]] == [
        [2, 4712, "ready", 1],
        ["2.0", 4713, "child", 2],
        [3, 4712, "ready", 1],
    ]


def test_of_many_generations_that_drain_the_newest_are_lanes(seen: Seen) -> None:
    draining = [generation(number, "draining", active=1) for number in range(2, 60)]
    shown = seen.see(status(generation(1, active=2), *draining, generation(60, "starting")))

    newest = range(59, 59 - ENDING_LANES, -1)
    assert [lane["number"] for lane in shown["lanes"]] == [60, *newest, 1]
    assert shown["more_lanes"] == 58 - ENDING_LANES
    assert shown["active"] == 2 + 58, "they still count"


def test_rates_are_what_was_counted_within_the_window(seen: Seen) -> None:
    assert seen.see(status(generation(8, accepted=1000), forwarded=1000))["rate"] is None
    for second in range(1, 5):
        seen.see(status(generation(8, accepted=1000 + 50 * second), forwarded=1000 + 100 * second))
    assert seen.shown["rate"] == 100
    assert seen.lane(8)["rate"] == 50
    for _ in range(10):
        seen.see(status(generation(8, accepted=1200), forwarded=1400))
    assert (seen.shown["rate"], seen.lane(8)["rate"]) == (0, 0)


def test_rates_do_not_depend_on_how_long_the_machine_runs(seen: Seen) -> None:
    seen.at = 1_000_000.0
    for second in range(3):
        seen.see(status(generation(8, accepted=5 * second), forwarded=10 * second))

    assert (seen.shown["rate"], seen.lane(8)["rate"]) == (10, 5)


def test_where_the_protector_does_not_count_workers_do(seen: Seen) -> None:
    for second in range(3):
        seen.see(status(generation(8, accepted=30 * second), forwarded=None))
    assert seen.shown["rate"] == 30
    seen.see(status(generation(8, accepted=None), forwarded=None))
    assert seen.shown["rate"] is None


def test_a_new_protector_at_the_same_socket_counts_from_the_beginning(seen: Seen) -> None:
    seen.see(status(forwarded=9000))
    seen.see(status(forwarded=9100))
    assert seen.see(status(forwarded=5, started_at=99.0))["rate"] is None
    assert seen.see(status(forwarded=15, started_at=99.0))["rate"] == 10


def test_what_came_while_it_did_not_answer_is_no_rate(seen: Seen) -> None:
    seen.see(status(forwarded=0))
    seen.see(status(forwarded=10))
    seen.instance.lost("silent")
    assert (seen.shown["why"], seen.shown["rate"]) == ("silent", 10)  # what was last known
    shown = seen.see(status(forwarded=9000), after_s=60)
    assert (shown["why"], shown["rate"]) == ("", None)


def test_waits_are_those_within_the_window(seen: Seen) -> None:
    seen.see(status(generation(8, wait_us=waited(b20=1000))))
    assert (seen.shown["p50"], seen.shown["p99"]) == (None, None)
    seen.see(status(generation(8, wait_us=waited(b20=1000, b4=98, b10=2))))
    assert (seen.shown["p50"], seen.shown["p99"]) == (15, 1023)
    assert (seen.lane(8)["p50"], seen.lane(8)["p99"]) == (15, 1023)
    for _ in range(8):
        seen.see(status(generation(8, wait_us=waited(b20=1000, b4=98, b10=2))))
    assert seen.shown["p99"] is None


def test_a_drain_is_as_far_as_its_connections_are_and_says_who_keeps_it_alive(seen: Seen) -> None:
    busy = [worker(n, pid=100 + n, active=n) for n in range(7)]
    seen.see(status(generation(7, "serving", *busy, active=21)))
    assert seen.lane(7)["drain"] is None

    drains = generation(7, "draining", *busy, active=21)
    seen.see(status(drains, generation(8)))
    assert (seen.lane(7)["drain"]["left"], seen.lane(7)["drain"]["of"]) == (21, 21)
    left = [worker(1, pid=101, active=0), worker(3, pid=103, active=2), worker(5, pid=105)]
    seen.see(status(generation(7, "draining", *left, active=3), generation(8)))

    drain = seen.lane(7)["drain"]
    assert (drain["left"], drain["of"], drain["what"]) == (3, 21, "connections")
    assert drain["by"] == ["worker 3 (pid 103): 2", "worker 5 (pid 105): 1"]
    assert drain["more"] == 0


def test_a_drain_without_counts_is_as_far_as_its_workers_are(seen: Seen) -> None:
    many = [worker(n, pid=n, active=None) for n in range(1, 7)]
    seen.see(status(generation(7, "draining", *many, active=None), generation(8)))
    orphans = worker(2, pid=2, state="orphaned", active=None)
    seen.see(status(generation(7, "draining", many[0], orphans, active=None), generation(8)))

    drain = seen.lane(7)["drain"]
    assert (drain["left"], drain["of"], drain["what"]) == (2, 6, "workers")
    assert drain["by"] == ["worker 1 (pid 1)", "processes that worker 2 has left (ps -s 2)"]


def test_a_drain_that_is_first_seen_halfway_begins_there(seen: Seen) -> None:
    seen.see(status(generation(7, "draining", active=4), generation(8)))
    seen.see(status(generation(7, "draining", active=1), generation(8)))

    assert (seen.lane(7)["drain"]["left"], seen.lane(7)["drain"]["of"]) == (1, 4)


def test_a_failed_release_shows_its_last_words_and_whether_it_is_the_last_one(seen: Seen) -> None:
    reason = "worker 5 exited with status 1; its last words:\nTraceback\n\tno module\x1b[31m\n"
    assert seen.see(status(reloads=[reload(1, "reloaded")]))["failed"] is None

    shown = seen.see(status(reloads=[reload(1, "reloaded"), reload(2, "failed", reason)]))
    assert shown["failed"] == {
        "generation": 2,
        "at": 151.0,
        "reason": "worker 5 exited with status 1",
        "words": "Traceback\n    no module\\x1b[31m",
        "last_line": "no module\\x1b[31m",
        "last": True,
    }
    running = seen.see(status(reloads=[reload(2, "failed", reason), reload(3, "running")]))
    assert running["failed"]["last"]
    better = seen.see(status(reloads=[reload(2, "failed", reason), reload(3, "reloaded")]))
    assert not better["failed"]["last"]
    # A status has the last ten: it is remembered.
    later = seen.see(status(reloads=[reload(n, "reloaded") for n in range(4, 14)]))
    assert (later["failed"]["generation"], later["failed"]["last"]) == (2, False)


def test_what_an_operator_should_know_is_noted(seen: Seen) -> None:
    assert seen.see(status())["notes"] == []
    notes = seen.see(
        status(generation(8, oldest_waiting_s=31.2), held_s=9.0, lame_duck="on", phase="serving")
    )["notes"]
    assert notes == [
        "held: no connection is accepted",
        "lame duck: /readyz answers 503",
        "generation 8: a client has waited for 31 s",
    ]


def test_warnings_of_the_start_are_shown_cut_and_counted(seen: Seen) -> None:
    assert seen.see(status())["warnings"] == []
    shown = seen.see(status(warnings=["a\x1b[2J", 7, "x" * 900, *map(str, range(20))]))["warnings"]
    assert (shown[0], len(shown[1])) == ("a\\x1b[2J", 500)
    assert shown[2:] == [*map(str, range(8)), "and 12 more: socketprotectorctl --name web status"]
    assert seen.see(status(warnings={"a": 1}))["warnings"] == []


def test_first_programs_that_fail_are_noted(seen: Seen) -> None:
    told = {"failed": 1, "reason": "its first program failed early", "last_words": "a\nb\x1b[2J"}
    assert seen.see(status(generation(8, first_programs=told)))["notes"] == [
        "generation 8: its first program failed early: b\\x1b[2J"
    ]


def test_what_it_waits_for_is_shown_with_the_time_that_is_left(seen: Seen) -> None:
    assert seen.see(status())["waits_for"] == []
    told = [
        {"kind": "room", "generation": 8, "reason": "generation 8 still has 1 connection"},
        {"kind": "settle", "generation": 9, "reason": "settling\x1b[2J", "left_s": 3.2},
        {"kind": "drain", "reason": "a long one", "left_s": 300.0},
        "nonsense",
    ]
    assert seen.see(status(waits_for=told))["waits_for"] == [
        "generation 8 still has 1 connection",
        "settling\\x1b[2J, 4 s left",
        "a long one, 5m left",
    ]


@pytest.mark.parametrize(
    ("state", "last", "notes"),
    [
        ("healthy", "", []),
        ("unhealthy", "answered 503\n", ["unhealthy: answered 503\\n"]),
        ("unknown", "", []),
        ("unknown", "not probed: no process", ["health unknown: not probed: no process"]),
        (3, "", []),
    ],
)
def test_what_comes_of_health_is_shown(
    seen: Seen, state: object, last: str, notes: list[str]
) -> None:
    assert seen.see(status(health=None))["health"] == ""
    shown = seen.see(status(health={"probe": "http:/", "state": state, "last": last}))

    assert shown["health"] == (state if isinstance(state, str) else "unknown")
    assert shown["notes"] == notes


def test_the_reason_is_the_last_bad_answer_though_the_next_question_waits(seen: Seen) -> None:
    found = {"probe": "http:/", "state": "unhealthy", "last": "busy: none", "reason": "GET /: 500"}

    assert seen.see(status(health=found))["notes"] == ["unhealthy: GET /: 500"]


def test_what_is_tried_gets_no_client_and_its_verdict_stands_until_a_reload(seen: Seen) -> None:
    serving, tried = generation(8, "serving", worker(1)), generation(9, "starting", worker(2))
    assert seen.see(status())["tried"] is None

    seen.see(status(serving, tried, dry_run=reload(9, "running")))
    assert (seen.lane(9)["note"], seen.lane(8)["note"]) == ("dry run: it gets no client", "")
    assert seen.shown["tried"] is None

    reason = "worker 2 exited with status 1; its last words:\nTraceback"
    failed = reload(9, "failed", reason)
    shown = seen.see(status(serving, dry_run=failed, reloads=[reload(8, "reloaded")]))
    assert shown["tried"] == {
        "generation": 9,
        "at": 151.0,
        "reason": "worker 2 exited with status 1",
        "words": "Traceback",
        "last_line": "Traceback",
        "passed": False,
    }
    assert (shown["failed"], shown["notes"]) == (None, [])  # what serves is well
    assert seen.see(status(dry_run=reload(10, "passed")))["tried"]["passed"]
    shown = seen.see(status(dry_run=failed, reloads=[reload(10, "running")]))
    assert shown["tried"] is None


@pytest.mark.parametrize(
    ("check", "note"),
    [
        ("", "generation 7 stands by"),
        ("http:/", "--settle-check probes http:/; generation 7 stands by"),
    ],
)
def test_while_one_settles_the_one_before_stands_by(seen: Seen, check: str, note: str) -> None:
    new = generation(8, "settling", worker(2), serving_since_at=160.0, settle_check=check)
    seen.see(status(generation(7, "serving", worker(1)), new, phase="settling", route=8))

    assert (seen.lane(7)["phase"], seen.lane(8)["phase"]) == ("standby", "settling")
    assert (seen.lane(8)["since"], seen.lane(8)["note"]) == (160.0, note)
    assert seen.lane(7)["note"] == "gets new clients again if the new one fails"
    # The old one has failed meanwhile: there is none to go back to.
    seen.see(status(new, phase="settling", route=8))
    assert "stands by" not in seen.lane(8)["note"]


def test_while_one_has_a_share_the_other_has_the_rest(seen: Seen) -> None:
    new = generation(9, "settling", worker(2), settle_check="http:/")
    both = generation(8, "serving", worker(1)), new
    waits = [{"kind": "canary", "reason": "5%"}, {"kind": "drain", "reason": "generation 7"}]
    shown = seen.see(status(*both, route=8, rollout=canary(), waits_for=waits))

    assert (seen.lane(8)["phase"], seen.lane(9)["phase"]) == ("serving", "settling")
    assert seen.lane(8)["note"] == "95% of new connections"
    assert seen.lane(9)["note"] == "5% of new connections; --settle-check probes http:/"
    text = "rollout: generation 9 gets 5% of new connections (1,230 so far); it gets all in 41s"
    assert shown["waits_for"] == [text, "generation 7"]

    seen.see(status(*both, route=8, rollout=canary(share=0.5)))
    assert seen.lane(8)["phase"] == "serving"
    assert seen.lane(8)["note"] == "99.5% of new connections"

    shown = seen.see(status(*both, route=9, rollout=canary("all", left_s=None)))
    assert seen.lane(8)["phase"] == "standby"
    assert "of new connections" not in seen.lane(9)["note"]

    shown = seen.see(status(*both, route=8, rollout=rolling(awaited(5, 1, 61.0))))
    text = "rollout: 3 of 8 workers replaced, waiting for worker 5 (1 connection, longest 1m1s)"
    assert shown["waits_for"] == [text]
    assert seen.lane(9)["note"].startswith("37.5% of new connections")


def test_a_lane_names_its_release(seen: Seen) -> None:
    old, new = generation(8, "serving", release="1"), generation(9, "starting", release="2")
    seen.see(status(old, new, dry_run={"generation": 9, "result": "running"}))

    assert seen.lane(8)["note"] == "release 1"
    assert seen.lane(9)["note"] == "release 2; dry run: it gets no client"


def test_a_rollout_of_nonsense_is_a_line_that_is_not_too_long(seen: Seen) -> None:
    nonsense = rolling(
        *(awaited(10**9, 10**99, 1e300) for _ in range(3)), replaced=10**50, wanted=None
    )
    shown = seen.see(status(rollout=nonsense))

    assert len(shown["waits_for"][0]) == 240


def test_a_thousand_workers_are_some_cells_and_a_number(seen: Seen) -> None:
    seen.see(status(generation(8, "serving", *[worker(n) for n in range(1000)])))

    assert len(seen.lane(8)["workers"]) == CELLS
    assert (seen.lane(8)["size"], seen.lane(8)["ready"]) == (1000, 1000)
    assert len(json.dumps(seen.shown)) < 10_000


def test_a_history_has_ten_minutes_and_gaps_where_nothing_is_known() -> None:
    history = History()
    assert history.points() == {"step": 0, "rate": [], "active": [], "p99": []}
    first = int(BEGAN // STEP_S)
    for step in (0, 1, 4):
        history.put(BEGAN + step * STEP_S, rate=step + 0.26, active=step, p99=None)
    found = history.points()
    assert found["step"] == first + 4
    assert found["rate"] == [0.3, 1.3, None, None, 4.3]
    assert found["active"] == [0, 1, None, None, 4]
    assert found["p99"] == [None] * 5
    assert history.points(2)["rate"] == [4.3]

    for step in range(5, 5 + 2 * POINTS):
        history.put(BEGAN + step * STEP_S, rate=20.4, active=1.0, p99=1)
    assert history.points()["rate"] == [20] * POINTS
    # An hour of nothing, and a clock that is set back.
    for seconds in (5000.0, -5000.0):
        history.put(BEGAN + seconds, rate=7.0, active=1.0, p99=1)
        assert history.points()["rate"] == [7]


def test_an_event_is_a_line_with_the_last_of_its_last_words() -> None:
    told = {
        "v": 1,
        "event": "reload-failed",
        "at": 12.5,
        "level": "error",
        "generation": 2,
        "reason": "exited with <b>1</b>\n",
        "last_words": "Traceback\nno module\n\n",
    }

    assert event_line(told) == {
        "at": 12.5,
        "level": "error",
        "event": "reload-failed",
        "generation": 0,
        "text": 'generation=2 reason="exited with <b>1</b>\\n"',
        "last": "no module",
    }
    assert len(event_line({**told, "reason": "x" * 9000})["text"]) == 240


def heard(seen: Seen, event: str, **fields: Any) -> tuple[str, int]:
    """Return the release that an event is shown with, and its generation."""
    shown = seen.instance.hear({"v": 1, "event": event, "at": 1.0, "level": "info", **fields})
    return shown.get("release", ""), shown["generation"]


def test_each_event_of_a_release_belongs_to_it(seen: Seen) -> None:
    assert heard(seen, "spawned", generation=1, worker=1) == ("", 0)  # of which run?
    seen.see(status(generation(7, "draining", worker(13)), generation(8, "serving", worker(14))))
    new = ("50.0 9", 9)

    assert heard(seen, "reloading") == new
    assert heard(seen, "spawned", generation=9, worker=15) == new
    assert heard(seen, "reload-failed", generation=9) == new
    assert heard(seen, "signalled", worker=15, signal="TERM") == new
    assert heard(seen, "exited", generation=9, worker=15) == new
    assert heard(seen, "signalled", worker=13) == ("50.0 7", 7)
    assert heard(seen, "signalled", worker=99) == ("", 0)
    assert heard(seen, "held") == ("", 0)
    assert heard(seen, "reloading") == ("50.0 10", 10)
    # Another protector at the same socket counts from 1.
    seen.instance.lost("gone")
    assert heard(seen, "ready", generation=1) == ("", 0)
    seen.see(status(generation(1, "serving"), started_at=90.0))
    assert heard(seen, "worker-ready", generation=1, worker=1) == ("90.0 1", 1)


def test_what_cannot_be_known_is_named(seen: Seen) -> None:
    def unknown(**fields: Any) -> tuple[list[str], list[str]]:
        shown = seen.see(status(generation(8, **fields), generation(9, "starting"), **of_all))
        return shown["unknown"], seen.lane(8)["unknown"]

    nothing: dict[str, Any] = {"accepted": None, "wait_us": None}
    of_all: dict[str, Any] = {}
    assert unknown() == ([], [])
    assert unknown(**nothing) == (["waits"], ["rate", "waits"])  # the protector counts those
    of_all = {"forwarded": None}
    assert unknown(**nothing) == (["rate", "waits"], ["rate", "waits"])
    nothing |= {"active": None, "queue": None}
    assert unknown(**nothing) == (["active", "queue", "rate", "waits"],) * 2


def test_a_stop_that_was_announced_is_no_trouble(seen: Seen) -> None:
    seen.see(status())
    heard(seen, "stopped")
    seen.instance.lost("gone")
    assert (seen.shown["why"], seen.shown["seen"]) == ("stopped", BEGAN + seen.at)
    seen.instance.lost("dead")
    assert seen.shown["why"] == "stopped"
    assert "seen" not in seen.see(status())
    # The end of the connection may hide that event; a stop removes the socket, a kill does not.
    seen.instance.lost("gone")
    seen.instance.lost("dead", has_socket=False)
    assert seen.shown["why"] == "stopped"
    seen.see(status())
    seen.instance.lost("gone")
    seen.instance.lost("dead")
    seen.instance.lost("dead", has_socket=False)
    assert seen.shown["why"] == "dead"


def test_of_many_last_words_the_end_is_shown() -> None:
    words = words_of("line\n" * 5000 + "the last\n")

    assert words.endswith("line\nthe last")
    assert len(words) <= 4000
    assert words_of("\u202eevil\x00") == "\\u202eevil\\x00"


def test_one_id_is_one_socket_s() -> None:
    assert Instance("/a").id == Instance("/a").id != Instance("/b").id


PLAIN = some.none() | some.booleans() | some.floats() | some.integers() | some.text(max_size=3)
OBJECT = some.dictionaries(
    some.sampled_from(sorted({*status(), *generation(1), *worker(1), *listener()})), PLAIN
)
JUNK = PLAIN | OBJECT | some.lists(PLAIN | OBJECT, max_size=3)


@given(some.dictionaries(some.sampled_from(sorted(status())), JUNK), OBJECT)
@settings(max_examples=rounds(25, 100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_status_breaks_it(told: dict[str, Any], event: dict[str, Any]) -> None:
    seen = Seen()
    seen.see({**status(), **told})
    seen.see({**status(), **told})
    json.dumps(seen.instance.history.points(), allow_nan=False)
    json.dumps(event_line(event), allow_nan=False)
