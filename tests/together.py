"""`@together`: all cases of a check in one test, where a test for each costs more than the check.

To set up, report and tidy up after a test costs some milliseconds, and each process of `pytest -n`
collects every one.  So a check of some microseconds takes its cases in a loop, and tells every
case that fails.  It is written as with `pytest.mark.parametrize`.  The cases share the fixtures:
what each needs fresh it makes itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def together(
    names: str | Sequence[str], cases: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with each case: a value for one name, a tuple for several.

    The test raises a group with the exception of each case that failed, which names the case.
    """
    named = (names,) if isinstance(names, str) else tuple(names)
    rows = [(case,) if isinstance(names, str) else tuple(case) for case in cases]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def all_of_them(**fixtures: Any) -> None:
            assert rows, "there is no case"
            wrong: list[BaseException] = []
            for row in rows:
                given = dict(zip(named, row, strict=True))
                try:
                    test(**fixtures, **given)
                except (Exception, pytest.fail.Exception, BaseExceptionGroup) as error:
                    error.add_note("with " + ", ".join(f"{n}={v!r:.200}" for n, v in given.items()))
                    wrong.append(error)
            if wrong:
                raise BaseExceptionGroup(f"{len(wrong)} of {len(rows)} cases fail", wrong)

        signature = inspect.signature(test)
        left = [each for name, each in signature.parameters.items() if name not in named]
        all_of_them.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return all_of_them

    return decorate
