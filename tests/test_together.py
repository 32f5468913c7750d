"""What @together tells: every case that fails, and that there is one at all."""

from __future__ import annotations

import pytest

from tests.together import together


@together(("a", "b"), [(1, 1), (1, 2), (2, 2), (2, 3)])
@together("c", [0, 1])
def equal(a: int, b: int, c: int, *, fixture: str) -> None:
    if fixture == "outcome":
        pytest.fail("failed")
    assert a == b


@together("a", [])
def never(a: int) -> None:
    raise AssertionError


def test_each_case_that_fails_is_told_with_its_values() -> None:
    with pytest.raises(ExceptionGroup, match="2 of 4 cases fail") as told:
        equal(fixture="assertion")

    assert [each.__notes__ for each in told.value.exceptions] == [
        ["with a=1, b=2"],
        ["with a=2, b=3"],
    ]
    for of_one in told.value.exceptions:
        assert isinstance(of_one, ExceptionGroup)
        assert [each.__notes__ for each in of_one.exceptions] == [["with c=0"], ["with c=1"]]


def test_an_outcome_of_pytest_is_a_failure_of_its_case() -> None:
    with pytest.raises(BaseExceptionGroup, match="4 of 4 cases fail"):
        equal(fixture="outcome")


def test_no_case_at_all_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="there is no case"):
        never()
