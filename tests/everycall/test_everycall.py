"""Faults at single system calls: those that once failed, and a part of `make everycall`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.c.building import installed
from tests.everycall.life import OPERATIONS
from tests.everycall.trials import MENDED, found_sites, trials, try_one

#: Of each operation, `make test-all` tries so many: 300 in all.
EACH = -(-300 // len(OPERATIONS))


@pytest.fixture(autouse=True)
def _compiler() -> None:
    installed("gcc")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("operation", "place", "code"), MENDED)
def test_a_fault_that_once_did_harm(tmp_path: Path, operation: str, place: str, code: int) -> None:
    sites = found_sites(tmp_path, [operation])[operation]
    chosen = [site for site in sites if site.startswith(f"{place}:")]
    assert chosen

    outcomes = [try_one(tmp_path, (operation, site, code)) for site in chosen]

    assert all(each["fired"] for each in outcomes)
    assert not any(each["problems"] for each in outcomes), outcomes


@pytest.mark.costly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_faults_at_single_calls_do_no_harm(tmp_path: Path, operation: str) -> None:
    drawn = trials(found_sites(tmp_path, [operation]))[:EACH]

    outcomes = [try_one(tmp_path, each) for each in drawn]

    assert sum(each["fired"] for each in outcomes) > EACH // 2
    failed = [each for each in outcomes if each["problems"]]
    assert not failed, "\n".join(map(str, failed))
