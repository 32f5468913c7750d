"""`pytest --once`: of each test that starts programs one combination of its parameters.

Which one: that whose values were met least in its file so far, so that a file's tests take
handoffs, servers, kinds of listener in turns.  The same are chosen in every run, and by every
process of one.  Tests within one process cost little and are run whole, except simulations, and
those at a system boundary that are `slow`; so are pages, which have no common parts.  None is run
that is marked `costly`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType

import pytest

_ROOT = Path(__file__).parent
_RUN_WHOLE = {"unit", "boundary", "pages", "test_imports.py"}


def chosen(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return those to run."""
    tests: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("costly") is None:
            tests.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    met: Counter[object] = Counter()
    keep: set[pytest.Item] = set()
    for each in tests.values():
        if _is_run_whole(each[0]):
            keep.update(each)
            continue
        one = min(each, key=lambda item: sum(met[value] for value in _values(item)))
        met.update(_values(one))
        keep.add(one)
    return keep


def is_costly(test: object) -> bool:
    """Say whether all cases of a test function are costly."""
    marks = getattr(test, "pytestmark", ())
    return isinstance(test, FunctionType) and any(each.name == "costly" for each in marks)


def _is_run_whole(item: pytest.Item) -> bool:
    kind = item.path.relative_to(_ROOT).parts[0]
    waits = kind == "boundary" and item.get_closest_marker("slow") is not None
    return kind in _RUN_WHOLE and not waits


def mixed(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return the tests in an order that mixes those that compute with those that wait.

    Tests of one file often wait for the same: side by side they leave the processors idle, and the
    next file's fight for them.  The order is the same in every run and every process.  Tests that
    share a fixture of their module stay together.  A test within one process is short, so only
    such tests are at the end, where few are left to run side by side.
    """
    return sorted(items, key=_place)


def _place(item: pytest.Item) -> tuple[bool, float]:
    name = str(item.path.relative_to(_ROOT)) if _shares_a_fixture(item) else item.nodeid
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    whole = item.path.relative_to(_ROOT).parts[0] in _RUN_WHOLE
    return item.get_closest_marker("slow") is None, place if whole else place * 0.9


def _shares_a_fixture(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and any(
        each.scope == "module"
        for name in item.fixturenames
        for each in item._fixtureinfo.name2fixturedefs.get(name, ())
    )


def _values(item: pytest.Item) -> Iterator[object]:
    spec = getattr(item, "callspec", None)
    if spec is not None:
        for name, value in spec.params.items():
            yield item.path, name, repr(value)
