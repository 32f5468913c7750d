"""The figures of bench/fleet_size.md: batches as Ansible makes them, and how far a fault comes."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

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
    reached_without_batches,
    tables,
)
from tests.running import ROOT

#: It shows on one host of a hundred after 30 s, and the release is stopped at once.
ROUGH = Fault(0.01, 30, 0)
#: Of the machine on which five hosts were measured.
PROCESSORS = 2
COSTS = Costs(batch_s=10, host_s=4, processors=2, play_s=5, forks=50)


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


def test_a_batch_takes_one_hosts_time_or_what_the_processors_take_for_all() -> None:
    assert COSTS.batch(1, 30) == COSTS.batch(2, 30) == 30 + 10
    assert COSTS.batch(3, 30) == 30 + 6 + 5
    assert replace(COSTS, processors=1).batch(3, 30) == 30 + 12


def test_a_batch_above_the_forks_takes_several_rounds_with_a_settle_each() -> None:
    assert COSTS.batch(50, 30) == 30 + 105
    assert COSTS.batch(102, 30) == 2 * (30 + 105) + 40


def test_five_hosts_in_batches_of_one_and_in_one_batch_tell_the_costs() -> None:
    one_by_one_s, all_at_once_s = (
        duration_s(each.plan, FIVE, each.settle_s, COSTS) for each in MEASURED[:2]
    )
    found = fitted(one_by_one_s, all_at_once_s, COSTS.play_s, MEASURED[0].settle_s, 2)

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
    assert tables(Costs()) in (ROOT / "bench" / "fleet_size.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("canaries", [1, 10, 100])
def test_without_batches_the_mean_is_that_of_many_releases(canaries: int) -> None:
    drawn = random.Random(1)
    total, runs = 0.0, 4000
    for _ in range(runs):
        total += canaries
        if not any(drawn.random() < ROUGH.share for _ in range(canaries)):
            total += next(n for n in itertools.count(1) if drawn.random() < ROUGH.share)
            total += 10 * ROUGH.after_s

    assert reached_without_batches(canaries, 10, ROUGH) == pytest.approx(total / runs, rel=0.03)


def test_a_rough_figure_from_elsewhere_is_what_comes_without_batches() -> None:
    """A rough figure from elsewhere: 422, 353 and 259 hosts."""
    found = [reached_without_batches(canaries, 10, ROUGH) for canaries in (1, 10, 100)]

    text = (ROOT / "bench" / "fleet_size.md").read_text(encoding="utf-8")
    assert "{:.0f}, {:.0f} and {:.0f}".format(*found) in text
    assert found == pytest.approx([422, 353, 259], rel=0.06)


def test_five_hosts_took_what_is_computed_within_a_tenth() -> None:
    """The document has what --measure has printed."""
    text = (ROOT / "bench" / "fleet_size.md").read_text(encoding="utf-8")
    row = r"^\| ([^|]+) \| ([\d.]+) s \| (\d+) \| ([\d.]+) s \| ([\d.]+) s \|"
    rows = re.findall(row, text, re.MULTILINE)
    said = [(plan, float(settle_s), int(forks)) for plan, settle_s, forks, *_ in rows]
    assert said == [(str(each.plan), each.settle_s, each.forks) for each in MEASURED]
    [empty_s] = map(float, re.findall(r"A play that does nothing took ([\d.]+) s", text))
    measured = [float(row[3]) for row in rows]
    costs = fitted(measured[0], measured[1], empty_s, MEASURED[0].settle_s, PROCESSORS)

    for each, took_s, row in zip(MEASURED, measured, rows, strict=True):
        given = replace(costs, forks=each.forks)
        computed_s = duration_s(each.plan, FIVE, each.settle_s, given)
        assert float(row[4]) == pytest.approx(computed_s, abs=0.11)  # of rounded figures
        assert abs(computed_s / took_s - 1) < 0.1
