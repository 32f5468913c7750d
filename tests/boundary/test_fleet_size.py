"""The figures of docs/fleet-size.md: batches as Ansible makes them, and how far a fault comes."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from bench.fleet_size import (
    FIVE,
    MEASURED,
    Costs,
    Fault,
    Plan,
    duration_s,
    fitted,
    reached,
    tables,
)
from tests.running import ROOT

COSTS = Costs(batch_s=10, host_s=2.5, play_s=5, forks=50)


@pytest.mark.parametrize(
    ("plan", "hosts", "batches"),
    [
        (Plan((1, "10%", "50%")), 5, [1, 1, 2, 1]),  # as a play on five hosts has shown
        (Plan((1, "10%", "50%")), 100, [1, 10, 50, 39]),
        (Plan((2,)), 5, [2, 2, 1]),
        (Plan(("100%",)), 7, [7]),
        (Plan((1, 3)), 8, [1, 3, 3, 1]),
    ],
)
def test_batches_are_those_of_ansible(plan: Plan, hosts: int, batches: list[int]) -> None:
    assert list(plan.batches(hosts)) == batches


def test_a_batch_above_the_forks_takes_several_rounds_with_a_settle_each() -> None:
    assert COSTS.batch(1, 30) == COSTS.batch(4, 30) == 40
    assert COSTS.batch(50, 30) == 30 + 125
    assert COSTS.batch(102, 30) == 2 * (30 + 125) + 40


def test_five_hosts_in_batches_of_one_and_in_one_batch_tell_the_costs() -> None:
    one_by_one_s, all_at_once_s = (
        duration_s(plan, FIVE, settle_s, COSTS) for plan, settle_s in MEASURED[:2]
    )
    found = fitted(one_by_one_s, all_at_once_s, COSTS.play_s, MEASURED[0][1])

    assert (found.batch_s, found.host_s) == pytest.approx((COSTS.batch_s, COSTS.host_s))


def test_a_fault_of_every_host_reaches_the_first_batch_only() -> None:
    for first in (1, 10, 100):
        assert reached(Plan((first, 1000)), 10_000, 10, Fault(1.0, 1), COSTS) == first


def test_one_that_is_not_there_reaches_all() -> None:
    assert reached(Plan((1, 1000)), 10_000, 10, Fault(0.0, 1), COSTS) == 10_000


def test_the_later_it_shows_the_more_hosts_it_reaches() -> None:
    plan = Plan((1, 10, 100))
    far = [reached(plan, 10_000, 10, Fault(0.01, after_s), COSTS) for after_s in (5, 10, 60, 600)]

    assert far[0] == far[1]
    assert all(before <= after for before, after in itertools.pairwise(far))
    assert far[-1] > far[0]


@pytest.mark.parametrize("after_s", [5.0, 300.0])
def test_the_mean_is_that_of_many_releases(after_s: float) -> None:
    plan, fault, hosts, settle_s = Plan((1, 5, 20)), Fault(0.03, after_s, 60), 200, 10.0
    drawn = random.Random(1)
    total, runs = 0, 4000
    for _ in range(runs):
        clock, has_it, stop_at = 0.0, 0, float("inf")
        for size in plan.batches(hosts):
            if clock > stop_at:
                break
            has_it += size
            end = clock + COSTS.batch(size, settle_s)
            if stop_at == float("inf") and any(drawn.random() < fault.share for _ in range(size)):
                if after_s <= settle_s:
                    break
                stop_at = end - settle_s + fault.after_s + fault.noticed_s
            clock = end
        total += has_it

    assert reached(plan, hosts, settle_s, fault, COSTS) == pytest.approx(total / runs, rel=0.03)


def test_the_table_of_the_document_is_that_of_the_code() -> None:
    assert tables(Costs()) in (ROOT / "docs" / "fleet-size.md").read_text(encoding="utf-8")


def test_five_hosts_took_what_is_computed_within_a_tenth() -> None:
    """The document has what --measure has printed; a play that did nothing took 1.19 s."""
    text = (ROOT / "docs" / "fleet-size.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| 1 s \| ([\d.]+) s \| ([\d.]+) s \|", text, re.MULTILINE)
    assert [row[0] for row in rows] == [str(plan) for plan, _ in MEASURED]
    measured = [float(row[1]) for row in rows]
    costs = fitted(measured[0], measured[1], 1.19, 1.0)

    for (plan, settle_s), took_s, row in zip(MEASURED, measured, rows, strict=True):
        computed_s = duration_s(plan, FIVE, settle_s, costs)
        assert f"{computed_s:.1f}" == row[2]
        assert abs(computed_s / took_s - 1) < 0.1
