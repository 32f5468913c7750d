"""Names of releases, and the way back through the history."""

from __future__ import annotations

import json
import random

import pytest

from socketprotector.model.release import (
    ENTRIES,
    FAILED,
    PROVED,
    REFUSED,
    Entry,
    Fingerprint,
    HistoryError,
    ReleaseHistory,
    added,
    dump,
    failed_last,
    fill,
    is_name,
    latest,
    load,
    previous,
)
from tests.together import together

ONE = ReleaseHistory((Entry("1", 1.0),), ("1",))
MARKED = ReleaseHistory((Entry("1", 1.0, was=Fingerprint(device=1)),), ("1",))
WAS = Fingerprint(1, 2, "/srv/web/releases/1/daemon", 3, 4, 5)


def history(*names: str) -> ReleaseHistory:
    """A history of releases that were tried one after another; !NAME failed, ?NAME was refused."""
    found = ReleaseHistory()
    for at, name in enumerate(names):
        outcome = {"!": FAILED, "?": REFUSED}.get(name[0], PROVED)
        reason = "" if outcome == PROVED else "no table"
        found = added(found, Entry(name.lstrip("!?"), float(at), outcome, reason))
    return found


def there(name: str) -> bool:
    return True


@together("name", ["1", "2026-11-22", "v1.2~rc1+b", "A_b@c:d=e,f", "x" * 128])
def test_names(name: str) -> None:
    assert is_name(name)


@together(
    "name",
    [
        "",
        ".",
        "..",
        ".x",
        "-x",
        "a/b",
        "a b",
        "a\n",
        "é",
        "x" * 129,
        "a\0",
        None,
        1,
        "{x}",
        "~x",
        "a;b",
    ],
)
def test_no_names(name: object) -> None:
    assert not is_name(name)


def test_the_placeholder_is_replaced_only_where_there_are_releases() -> None:
    assert fill("x={release}/y:{release}", "/r/1") == "x=/r/1/y:/r/1"
    assert fill("{release}", "") == "{release}"


@together(
    ("tried", "serving", "goes_to"),
    [
        (("1", "2", "3"), "3", "2"),
        (("1", "2", "3", "2"), "2", "1"),  # after one rollback
        (("1", "2", "3", "2", "1"), "1", ""),  # after two
        (("1", "2", "1", "3"), "3", "1"),  # not to 2, which was left
        (("1", "2", "1"), "1", ""),  # never to and fro
        (("1", "!2", "3"), "3", "1"),
        (("1", "2", "3", "?2"), "3", "1"),
        (("1", "2", "3", "!2"), "3", "1"),  # 2 has failed since
        (("1", "2", "3", "2", "!1"), "2", ""),
        (("1", "!2", "2", "3"), "3", "2"),  # it was mended
        (("1",), "1", ""),
        ((), "1", ""),
        (("1", "2"), "9", "2"),  # the history misses the serving one
    ],
)
def test_the_way_back(tried: tuple[str, ...], serving: str, goes_to: str) -> None:
    assert previous(history(*tried), serving, there) == goes_to


def test_a_removed_release_is_passed_over() -> None:
    assert previous(history("1", "2", "3"), "3", lambda name: name != "2") == "1"
    assert previous(history("1", "2", "3"), "3", lambda name: False) == ""


@pytest.mark.parametrize("seed", range(40))
def test_rollbacks_end_and_never_come_back_to_a_release_that_was_left(seed: int) -> None:
    draw = random.Random(seed)
    # More than are kept: the way back does not begin anew where old entries are dropped.
    found = history(*(draw.choice("12345") for _ in range(draw.randrange(1, 200))))
    serving, left = found.entries[-1].release, set[str]()
    while to := previous(found, serving, there):
        left.add(serving)
        assert to not in left
        found, serving = added(found, Entry(to, 0.0)), to
    assert found.way == (serving,)


def test_a_release_that_serves_again_keeps_its_time() -> None:
    assert [each.at for each in history("1", "2", "2").entries] == [0.0, 1.0]


def test_a_release_that_fails_for_an_hour_removes_no_proved_one() -> None:
    found = history("1", "2", *["!3", "?3"] * 900)

    assert [each.release for each in found.entries] == ["1", "2", "3"]
    assert failed_last(found, "3")
    assert not failed_last(found, "2")
    assert not failed_last(found, "9")


def test_it_has_a_bound_and_keeps_the_newest() -> None:
    found = history(*map(str, range(500)))

    assert (len(found.entries), found.entries[-1].release) == (ENTRIES, "499")
    assert (len(found.way), found.way[-1]) == (ENTRIES, "499")
    long = added(ReleaseHistory(), Entry("1", 0.0, FAILED, "x" * 5000))
    assert len(long.entries[0].reason) == 300


def test_each_release_once_the_latest_tried_last() -> None:
    found = latest(history("1", "2", "!1"))

    assert list(found) == ["2", "1"]
    proved, failed = found["1"]
    assert (proved and proved.at, failed and failed.at) == (0.0, 2.0)


def test_what_is_written_is_read_again() -> None:
    found = ReleaseHistory(
        (Entry("1", 1.5, was=WAS), Entry("2", 2.0, REFUSED, 'no "x"\n')), ("0", "1")
    )
    assert load(dump(found)) == found
    assert load(dump(ReleaseHistory())) == ReleaseHistory()


@together(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"format": 1, "way": [], "entries": []}',
        b'{"format": 2, "way": [], "entries": 1}',
        b'{"format": 2, "way": 1, "entries": []}',
        b'{"format": 2, "way": ["../x"], "entries": []}',
        b'{"format": 2, "way": [], "entries": [1]}',
        b'{"format": 2, "way": [], "entries": [{"release": "1", "at": 1}]}',
        dump(ONE).replace(b'"release": "1"', b'"release": "../x"'),
        dump(ONE).replace(b'"at": 1.0', b'"at": "x"'),
        dump(ONE).replace(b'"reason": ""', b'"reason": 1'),
        dump(ONE).replace(b'"was": null', b'"was": {}'),
        dump(ONE)[:-4],
        dump(MARKED).replace(b'"device": 1', b'"device": 1e999'),
    ],
)
def test_anything_else_is_refused_by_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(HistoryError):
        load(data)


def test_the_file_of_version_0_9_0_is_read() -> None:
    """docs/compatibility.md promises it."""
    was = {"device": 1, "inode": 2, "program": "run", "program_inode": 3}
    entries = [
        {"release": "1", "at": 1.5, "outcome": "proved", "reason": "", "was": None},
        {
            "release": "2",
            "at": 2,
            "outcome": "proved",
            "reason": "",
            "was": {**was, "program_size": 4, "program_mtime_ns": 5},
        },
        {"release": "3", "at": 3.0, "outcome": "failed", "reason": "it exited", "was": None},
        {"release": "4", "at": 4.0, "outcome": "refused", "reason": "no file", "was": None},
    ]

    found = load(json.dumps({"format": 2, "way": ["1", "2"], "entries": entries}).encode())

    assert found == ReleaseHistory(
        (
            Entry("1", 1.5),
            Entry("2", 2, was=Fingerprint(1, 2, "run", 3, 4, 5)),
            Entry("3", 3.0, FAILED, "it exited"),
            Entry("4", 4.0, REFUSED, "no file"),
        ),
        ("1", "2"),
    )


def test_an_entry_with_an_outcome_of_a_newer_version_is_left_out() -> None:
    found = json.loads(dump(ONE))
    found["entries"].append({**found["entries"][0], "outcome": "postponed"})
    assert load(json.dumps(found).encode()) == ONE


def test_a_field_of_a_newer_version_is_passed_over() -> None:
    found = json.loads(dump(ONE))
    found["entries"][0]["more"] = 1
    assert load(json.dumps(found).encode()) == ONE
