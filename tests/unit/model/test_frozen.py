"""Values: what is equal, hashed and shown, and that they are dataclasses still."""

from __future__ import annotations

from dataclasses import asdict, field, replace

import pytest

from socketprotector.model.frozen import frozen


@frozen
class _Point:
    """Two fields, one of them with a default."""

    x: int
    y: int = 0


@frozen
class _Pair:
    """The same fields under another name."""

    x: int
    y: int = 0


@frozen
class _Nothing:
    """No field."""


@frozen
class _One:
    """A single field."""

    x: object


@frozen
class _Kept:
    """A field whose default is made for each."""

    kept: list[int] = field(default_factory=list)
    x: int = 0


def test_each_has_a_default_of_its_own_where_that_is_made() -> None:
    one, other = _Kept(), _Kept(x=1)
    one.kept.append(1)
    assert (one.kept, other.kept, _Kept([2]).kept) == ([1], [], [2])


@pytest.mark.parametrize(("values", "named"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 2})])
def test_the_first_and_each_later_one_is_refused_where_the_fields_are_wrong(
    values: tuple[int, ...], named: dict[str, int]
) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=r"__init__\(\)"):
            _Point(*values, **named)


def test_values_of_one_class_are_equal_by_their_fields() -> None:
    assert _Point(1, 2) == _Point(1, y=2)
    assert _Point(1, 2) != _Point(2, 1)
    assert _Nothing() == _Nothing()
    assert _One(1) == _One(1) != _One(2)


def test_those_of_another_class_are_others() -> None:
    pairs: list[tuple[object, object]] = [(_Point(1), _Pair(1)), (_Nothing(), ()), (_One(1), 1)]
    assert all(one != other for one, other in pairs)


def test_equal_ones_are_the_same_in_a_set() -> None:
    assert len({_Point(1), _Point(1, 0), _Point(2), _Nothing(), _Nothing(), _One(3)}) == 4


def test_they_are_shown_with_their_fields() -> None:
    assert repr(_Point(1)) == "_Point(x=1, y=0)"
    assert repr(_Nothing()) == "_Nothing()"


def test_they_are_dataclasses_without_a_dictionary() -> None:
    assert replace(_Point(1), y=3) == _Point(1, 3)
    assert asdict(_Point(1)) == {"x": 1, "y": 0}
    assert not hasattr(_Point(1), "__dict__")
