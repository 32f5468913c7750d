"""When each kind of probe is made, and that orders to all of them reach those that exist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.daemon import probing as module
from socketprotector.daemon.probing import Probing
from socketprotector.model.settings import Settings

ONE, TWO = cast("Any", "generation 1"), cast("Any", "generation 2")


class Part:
    """Stands for ReadyProbe, SettleCheck or Health; notes each call."""

    def __init__(self, world: World, name: str, given: tuple[object, ...]) -> None:
        self._calls, self._name = world.calls, name
        self.given = given
        self.why_not_ready, self.is_due, self.tcp_connection = "refused", True, "connection"

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self._calls.append((self._name, name, *values))


class World:
    """Probing whose parts are made by the test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.made: dict[str, Part] = {}
        self.health = ""
        for name, kind in (
            ("ready_probe", "ReadyProbe"),
            ("settle_check", "SettleCheck"),
            ("health", "Health"),
        ):
            patch.setattr(module, name, SimpleNamespace(**{kind: self._maker(name)}))
        self.probing = Probing(
            cast("Any", None),
            cast("Any", SimpleNamespace(reach=None)),
            cast("Any", None),
            settings=lambda: Settings("name", ("sh",), "/", health=self.health),
            remember=lambda _: None,
            pool=cast("Any", SimpleNamespace(answered=None, allow_timer=None, has_ready=None)),
        )

    def _maker(self, name: str) -> Any:
        def make(*given: object, **_: object) -> Part:
            assert name not in self.made
            self.made[name] = Part(self, name, given)
            return self.made[name]

        return make


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_nothing_is_made_before_it_is_needed(world: World) -> None:
    probing = world.probing
    probing.suspend()
    probing.resume()
    probing.stop_probing()
    probing.stop_checking()
    probing.set_serving(ONE)
    probing.apply_settings(ONE)

    assert (probing.why_not_ready, probing.settle_check_due, probing.note_settle_over(1)) == (
        "",
        False,
        False,
    )
    assert probing.tcp_connection is None
    assert not world.made


def test_each_part_is_made_once_and_used_for_every_generation(world: World) -> None:
    for each in (ONE, TWO):
        world.probing.probe_starting(each)
        world.probing.check_settling(each)
    world.probing.stop_probing()
    world.probing.stop_checking()

    assert [call for call in world.calls if call[0] == "ready_probe"] == [
        ("ready_probe", "begin", ONE),
        ("ready_probe", "begin", TWO),
        ("ready_probe", "stop"),
    ]
    assert [call for call in world.calls if call[0] == "settle_check"] == [
        ("settle_check", "begin", ONE),
        ("settle_check", "begin", TWO),
        ("settle_check", "stop"),
    ]
    assert world.probing.why_not_ready == "refused"
    assert world.probing.settle_check_due


def test_health_is_checked_only_with_the_option_and_of_a_generation(world: World) -> None:
    world.probing.set_serving(ONE)
    world.health = "accept"
    world.probing.set_serving(None)
    assert not world.made

    world.probing.set_serving(ONE)
    world.probing.set_serving(None)

    assert world.calls == [("health", "set_serving", ONE), ("health", "set_serving", None)]
    assert world.probing.tcp_connection == cast("Any", "connection")


def test_a_reload_that_adds_the_option_checks_the_generation_with_the_route(world: World) -> None:
    world.probing.apply_settings(ONE)
    world.health = "accept"
    world.probing.apply_settings(ONE)
    assert world.calls == [("health", "set_serving", ONE)]

    world.probing.apply_settings(TWO)

    assert world.calls[1:] == [("health", "apply_settings")]


def test_an_upgrade_suspends_and_resumes_the_parts_that_exist(world: World) -> None:
    world.health = "accept"
    world.probing.check_settling(ONE)
    world.probing.set_serving(ONE)
    world.calls.clear()

    world.probing.suspend()
    world.probing.resume()

    assert world.calls == [
        ("settle_check", "suspend"),
        ("health", "suspend"),
        ("settle_check", "resume"),
        ("health", "resume"),
    ]


def test_a_check_reads_the_counts_of_the_moment(world: World) -> None:
    world.probing.check_settling(ONE)
    counts = cast("Any", world.made["settle_check"].given[3])
    assert counts() == {}

    world.probing.counts = lambda: {1: {"active": 4}}

    assert counts() == {1: {"active": 4}}
