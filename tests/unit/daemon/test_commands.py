"""What the control socket's commands do where the real protector does not get to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from socketprotector.core.events import StopRequested
from socketprotector.core.fleet import Candidate, Fleet, Generation, Phase, Policy
from socketprotector.daemon.control import releases
from socketprotector.daemon.control.commands import CommandHandler
from socketprotector.model.control_requests import Request, RequestError


class Log:
    level = "info"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, level: str, event: str, **fields: object) -> None:
        self.lines.append(f"{level} {event} {fields['command']}")


def operator(log: Log) -> CommandHandler:
    """One whose every look at anything fails."""
    supervisor = cast("Any", SimpleNamespace(effects=SimpleNamespace()))
    runtime = cast("Any", SimpleNamespace(log=log))
    return CommandHandler(supervisor, runtime)


@pytest.mark.parametrize("command", ["status", "history", "connections", "crashes", "diff"])
def test_a_fault_of_ours_while_looking_ends_nothing(command: str) -> None:
    log = Log()

    with pytest.raises(RequestError) as caught:
        operator(log).handle(cast("Any", None), Request(command, {}, 7))

    assert (caught.value.code, caught.value.id) == ("failed", 7)
    assert log.lines == [f"error command-failed {command}"]


def test_a_fault_of_ours_while_something_is_changed_is_not_hidden() -> None:
    """The next program goes on from what is written down."""
    with pytest.raises(AttributeError):
        operator(Log()).handle(cast("Any", None), Request("scale", {"to": 2}))


def test_two_stops_in_one_turn_of_the_loop_are_both_carried_out() -> None:
    timers: dict[object, Any] = {}
    posted: list[StopRequested] = []
    loop = SimpleNamespace(call_after=lambda key, _, act: timers.update({key: act}))
    runtime = cast("Any", SimpleNamespace(log=Log(), loop=loop, post=posted.append))
    supervisor = cast("Any", SimpleNamespace(effects=None, fleet=Fleet(Policy())))
    handler = CommandHandler(supervisor, runtime)

    for quick in (True, False):
        client = cast("Any", SimpleNamespace(send_line=lambda line: None))
        handler.handle(client, Request("stop", {"quick": quick}))
    for act in timers.values():
        act()

    assert posted == [StopRequested(quick=True), StopRequested()]


_SERVES = Generation(1, Phase.SERVING)
_DRAINS = Generation(1, Phase.DRAINING)
_READ = Candidate(Policy())


@pytest.mark.parametrize(
    ("fleet", "killed", "advice"),
    [
        (Fleet(Policy(), generations=(_SERVES,)), 1, "serving; `replace` it first"),
        (Fleet(Policy(), generations=(_SERVES, Generation(2))), 2, "starting; `rollback` first"),
        (
            Fleet(Policy(), generations=(_SERVES, Generation(2, Phase.SETTLING))),
            2,
            "settling; `rollback` first",
        ),
        (
            Fleet(Policy(), generations=(Generation(1),)),
            1,
            "starting; try again when it is abandoned or draining; if it becomes serving instead, "
            "`replace` it first",
        ),
        (
            Fleet(Policy(), generations=(_SERVES, Generation(2, fresh=False))),
            2,
            "starting; try again when it is abandoned or draining; if it becomes serving instead, "
            "`replace` it first",
        ),
        (
            Fleet(Policy(), generations=(_SERVES, Generation(2)), dry_run=True),
            2,
            "starting; try again when it is abandoned or draining; if it becomes serving instead, "
            "`replace` it first",
        ),
    ],
)
def test_a_refused_kill_names_what_is_possible(fleet: Fleet, killed: int, advice: str) -> None:
    supervisor = cast("Any", SimpleNamespace(fleet=fleet))

    with pytest.raises(RequestError) as caught:
        CommandHandler(supervisor, cast("Any", None)).do_kill(killed)

    assert str(caught.value) == f"generation {killed} is {advice}"


@pytest.mark.parametrize(
    ("fleet", "refused"),
    [
        (
            Fleet(Policy(), generations=(_SERVES, Generation(2)), served=True),
            "a reload is in progress (generation 2); wait for its end, or `rollback`",
        ),
        (
            Fleet(Policy(), generations=(_SERVES, Generation(2)), served=True, dry_run=True),
            "a dry run is in progress (generation 2); wait for its end",
        ),
        (  # stop-first
            Fleet(Policy(), generations=(_DRAINS, Generation(2)), served=True),
            "a reload is in progress (generation 2); wait for its end, or `rollback`",
        ),
        (
            Fleet(Policy(), generations=(Generation(2),)),
            "a start is in progress (generation 2); wait for its end",
        ),
    ],
)
def test_a_refused_deploy_advises_a_rollback_only_where_it_works(
    fleet: Fleet, refused: str
) -> None:
    record = SimpleNamespace(candidate=None)
    live = SimpleNamespace(releases=SimpleNamespace(serving="1"), record=record)
    effects = cast("Any", SimpleNamespace(live_settings=live, generations={}))

    with pytest.raises(RequestError) as caught:
        releases.deploy(effects, fleet, cast("Any", None), "3")

    assert str(caught.value) == refused


@pytest.mark.parametrize(
    ("fleet", "generation"),
    [
        (Fleet(Policy(), generations=(_SERVES,), next_generation=2, reading=True), 1),
        (Fleet(Policy(), generations=(_SERVES,), next_generation=2, reading=True, release="3"), 2),
        (
            Fleet(Policy(), generations=(_SERVES, Generation(2)), next_generation=3, release="3"),
            2,
        ),
        (  # stop-first
            Fleet(Policy(), generations=(_DRAINS,), next_generation=2, candidate=_READ),
            2,
        ),
    ],
)
def test_status_has_the_generation_of_a_deploy_from_its_request_on(
    fleet: Fleet, generation: int
) -> None:
    """A command whose connection was cut waits for this generation's verdict.

    rollback --expect compares with the same release.
    """
    link = SimpleNamespace(named="1", path="/srv/current")
    found = SimpleNamespace(serving="1", link=link, become_owner=dict, is_saved=True, error="")
    read = SimpleNamespace(release="3") if fleet.candidate else None
    live = SimpleNamespace(releases=found, record=SimpleNamespace(candidate=read))
    effects = cast("Any", SimpleNamespace(live_settings=live, generations={}))

    assert releases.of_status(effects, fleet)["releases"]["generation"] == generation
    if generation == 2:
        releases.refuse_unexpected_incoming(effects, fleet, "3")
