"""What is set, equal, hashed and shown, and that they are dataclasses still."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

import pytest

from socketprotector.model.history import History, Reload
from socketprotector.model.lazy_dataclass import as_dict, field, frozen, mutable, replace
from socketprotector.model.settings import ListenerSettings, Settings
from tests.together import together


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


def _plain(field: Callable[..., list[int]]) -> type[Any]:
    """A class whose fields are yet to be made; what they make of them is in `x`."""

    class Part:
        a: int
        b: list[int] = field(default_factory=list)
        _: KW_ONLY
        c: int
        d: int = 4
        x: tuple[object, ...] = ()

        def __post_init__(self) -> None:
            self.x = self.a, self.b, self.c, self.d

    return Part


def _part() -> Callable[..., Any]:
    """One of which there is no object yet."""
    return mutable(_plain(field))


#: The same as the standard library has it.
_STANDARD = dataclass(_plain(dataclasses.field))
#: From how many objects of a class on each is made in the same way.
LIKE = 3


@together(
    ("values", "named"),
    [
        ((1,), {"c": 3}),
        ((1, [2]), {"c": 3, "d": 5}),
        ((), {"d": 5, "c": 3, "b": [2], "a": 1}),
        ((), {"c": 3}),
        ((1,), {}),
        ((1, [2], 3), {}),
        ((1,), {"a": 2, "c": 3}),
        ((1,), {"c": 3, "e": 6}),
    ],
)
def test_the_first_and_each_later_one_is_made_as_a_dataclass_is_or_refused(
    values: tuple[object, ...], named: dict[str, object]
) -> None:
    part = _part()
    try:
        wanted = _STANDARD(*values, **named).x
    except TypeError:
        for _ in range(LIKE):
            with pytest.raises(TypeError, match=r"__init__\(\)"):
                part(*values, **named)
    else:
        assert [part(*values, **named).x for _ in range(LIKE)] == LIKE * [wanted]


def test_each_has_a_default_of_its_own_where_that_is_made() -> None:
    part = _part()
    made = [part(1, c=3).b for _ in range(LIKE)]
    for n, each in enumerate(made):
        each.append(n)
    assert made == [[n] for n in range(LIKE)]


def test_what_may_change_is_the_same_as_nothing_else() -> None:
    part = _part()
    one = part(1, c=3)
    assert one == one  # noqa: PLR0124  it is what is tested
    assert one != part(1, c=3)
    assert len({one, part(1, c=3)}) == 2


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


def test_replace_is_that_of_dataclasses() -> None:
    assert replace(_Point(1), y=3) == _Point(1, 3)
    assert replace(_Point(1, 2)) == _Point(1, 2)
    before = Settings("name", ("sh",), "", workers=3)
    assert replace(before, name="other") == dataclasses.replace(before, name="other")
    with pytest.raises(TypeError):
        replace(before, nonsense=1)  # type: ignore[call-arg]


def test_as_dict_is_that_of_dataclasses() -> None:
    settings = Settings("name", ("sh", "-c"), "", listeners=(ListenerSettings("unix:/a"),))
    history = History(dry_run=Reload(3, began_at=1.0), reloads=(Reload(1, began_at=0.5),))
    for value in (_Point(1), _Nothing(), settings, history):
        assert as_dict(value) == asdict(value)


def test_they_are_dataclasses_for_who_asks() -> None:
    assert dataclasses.replace(_Point(1), y=3) == _Point(1, 3)
    assert asdict(_Point(1)) == {"x": 1, "y": 0}
    part: Any = _part()
    fields = {each.name: each for each in dataclasses.fields(part)}
    assert list(fields) == ["a", "b", "c", "d", "x"]
    assert fields["b"].default_factory is list
    assert [fields[name].kw_only for name in "ac"] == [False, True]


def test_no_second_class_is_made() -> None:
    plain = _plain(field)
    assert mutable(plain) is plain
    assert not hasattr(plain, "d")  # its default is not the value of an attribute that is not set
