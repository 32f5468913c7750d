"""Releases to five hosts behind HAProxy by Ansible: what fails in the middle, and what comes of it.

make test-fleet     (root; minutes)

Not collected by itself: the name is no test's.  No test lets a timing decide.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator

import pytest

from tests.fleet.hosts import Fleet, Host, Load, Machine, fleet, wait
from tests.fleet.needs import marks

pytestmark = marks


@pytest.fixture
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Five hosts with a long settle."""
    options = ("--settle", "8s", "--settle-check", "http:/healthz")
    with fleet(tmp_path_factory.mktemp("fleet"), *options) as found:
        yield found


@pytest.fixture
def one(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    """One host with a long settle."""
    monkeypatch.setattr(Fleet, "SIZE", 1)
    options = ("--settle", "8s", "--settle-check", "http:/healthz")
    with fleet(tmp_path_factory.mktemp("fleet"), *options) as found:
        yield found


ONLY_IT = ("--limit", "localhost,host1")


def slow(fleet: Fleet) -> None:
    """Write a release `slow`, which fails once its host has /run/end."""
    daemon = fleet.folder / "releases" / "slow" / "daemon"
    daemon.parent.mkdir()
    daemon.write_text("#!/bin/sh\nuntil [ -e /run/end ]; do sleep 0.1; done; exit 7\n")
    daemon.chmod(0o755)


def settles(host: Host) -> bool:
    return bool(host.status["phase"] == "settling")


def test_a_release_that_fails_under_load_is_taken_back_and_the_play_stops(five: Fleet) -> None:
    load = Load(five.balancer, 100)

    status, said = five.release("late")

    assert status == 2, said
    assert "host1 does not take late: " in said
    assert "the cache is full" in said
    assert five.versions == ["1"] * five.SIZE
    assert [each.current for each in five.hosts] == ["1"] * five.SIZE
    assert [each.reloads for each in five.hosts] == [["failed"], [], [], [], []]
    assert not any(each.has("late") for each in five.hosts[1:])
    assert load.told().failures == []
    load.end()


def test_hosts_finish_their_own_verdict_when_the_operators_machine_dies(five: Fleet) -> None:
    load = Load(five.balancer, 100)
    first, *others = five.hosts
    five.releasing("2")
    wait(lambda: settles(first), "it is in the middle of the first one")

    five.operator.die()

    wait(lambda: first.reloads == ["reloaded"], "its own verdict")
    assert five.versions == ["2", "1", "1", "1", "1"]
    assert not any(each.has("2") for each in others)

    five.operator = Machine(five.network, "operator2", "10.0.0.3", five.folder / "operator2.log")
    five.machines.append(five.operator)
    status, said = five.release("2")

    assert status == 0, said
    assert five.versions == ["2"] * five.SIZE
    assert [each.reloads for each in five.hosts] == [["reloaded"]] * five.SIZE
    assert load.told().failures == []
    load.end()


def test_a_play_stops_at_a_host_that_dies_and_only_what_that_held_is_lost(five: Fleet) -> None:
    load = Load(five.balancer, 100)
    first, second, *others = five.hosts
    releasing = five.releasing("2")
    wait(lambda: settles(second), "it is in the middle of the second one")

    second.die()
    held = five.balancer.held_by(second)  # nothing told HAProxy that they are gone
    said, _ = releasing.communicate(timeout=300)

    assert releasing.returncode != 0, said
    assert "host2" in said
    assert "UNREACHABLE" in said
    assert first.version == "2"
    assert [each.version for each in others] == ["1"] * len(others)
    wait(lambda: five.balancer.state(second.name) == "DOWN", "HAProxy has seen it")
    lost = load.told()
    assert len(lost.failures) <= held, lost.failures
    wait(lambda: load.told().answered > lost.answered + 100, "all others are served")
    assert load.told().failures == lost.failures
    assert not any(each.has("2") for each in others)
    print(f"{len(lost.failures)} lost of {lost.answered}; the host held {held} connections")
    load.end()


def test_a_play_stops_at_a_host_that_hangs_and_a_second_run_goes_on_from_there(
    five: Fleet,
) -> None:
    load = Load(five.balancer, 100)
    first, second, *others = five.hosts
    second.signal(second.sshd, signal.SIGSTOP)  # the kernel accepts connections for it

    status, said = five.release("2")

    assert status != 0, said
    assert "host2" in said
    assert "UNREACHABLE" in said
    assert five.versions == ["2", "1", "1", "1", "1"]
    assert not any(each.has("2") for each in (second, *others))

    second.sshd.send_signal(signal.SIGCONT)  # nsenter has stopped, too, and takes it along
    status, said = five.release("2")

    assert status == 0, said
    assert five.versions == ["2"] * five.SIZE
    assert first.reloads == ["reloaded"]
    assert load.told().failures == []
    load.end()


def test_a_host_whose_exporter_dies_stays_in_rotation(five: Fleet) -> None:
    load = Load(five.balancer, 100)
    host = five.hosts[3]
    host.signal(host.exporter, signal.SIGKILL)
    wait(lambda: five.balancer.agent(host.name).startswith("L4"), "HAProxy has missed it")
    forwarded = host.status["forwarded"]

    assert five.balancer.state(host.name) == "UP"
    # Connections that HAProxy keeps are used again and again: it makes new ones after some seconds.
    wait(lambda: host.status["forwarded"] > forwarded, "it gets clients")

    assert load.told().failures == []
    host.export()
    wait(lambda: five.balancer.agent(host.name).startswith("L7OK"), "HAProxy hears of it again")
    load.end()


def test_a_stop_and_a_start_of_each_host_fails_no_request(five: Fleet) -> None:
    load = Load(five.balancer, 100)
    for host in five.hosts[:2]:
        host.signal(host.protector, signal.SIGTERM)
        wait(lambda host=host: five.balancer.state(host.name) == "DRAIN", "it is drained")  # type: ignore[misc]
        host.protector.wait(60)
        host.protect()
        wait(lambda host=host: five.balancer.state(host.name) == "UP", "it is back")  # type: ignore[misc]

    assert load.told().failures == []
    load.end()


def test_a_run_that_is_killed_leaves_its_verdict_to_the_host(one: Fleet) -> None:
    [host] = one.hosts
    slow(one)
    one.releasing("slow", *ONLY_IT)
    wait(lambda: host.status["releases"]["deploying"] == "slow", "it is tried")

    one.operator.die()

    assert host.current == "1"
    host.run("touch", "/run/end")
    wait(lambda: host.reloads == ["failed"], "the verdict")
    assert (one.versions, host.current) == (["1"], "1")
    one.operator = Machine(one.network, "operator2", "10.0.0.3", one.folder / "operator2.log")
    one.machines.append(one.operator)
    status, said = one.release("2", *ONLY_IT)

    assert status == 0, said
    assert (one.versions, host.current) == (["2"], "2")


def test_a_deploy_that_outlasts_its_limit_continues_and_another_is_refused(one: Fleet) -> None:
    [host] = one.hosts
    words = (*ONLY_IT, "-e", json.dumps({"socketprotector_release_timeout": "1s"}))
    slow(one)

    status, said = one.release("slow", *words)

    assert status == 2, said
    assert "host1 does not take slow: not done within 1s: " in said
    assert "the verdict is still to come, and current follows it" in said
    status, said = one.release("2", *words)
    assert status == 2, said
    assert "host1 does not take 2: a deploy of slow is in progress" in " ".join(said.split())
    assert (one.versions, host.current) == (["1"], "1")

    host.run("touch", "/run/end")
    wait(lambda: host.reloads == ["failed"], "the verdict")
    status, said = one.release("2", *words)  # settles for 8 s

    assert status == 2, said
    wait(lambda: host.current == "2", "the verdict")
    status, said = one.release("2", *words)

    assert status == 0, said
    assert re.findall(r"changed=(\d+)", said) == ["0", "0"]
    assert host.reloads == ["failed", "reloaded"]


def test_the_play_looks_without_a_change_and_says_why_a_protector_does_not_answer(
    one: Fleet,
) -> None:
    [host] = one.hosts

    status, said = one.release("2", *ONLY_IT, "--check")

    assert status == 0, said
    assert re.findall(r"changed=(\d+)", said) == ["1", "0"]
    assert (one.versions, host.current, host.has("2")) == (["1"], "1", False)
    assert host.reloads == []

    host.ctl("stop", "--quick")
    status, said = one.release("2", *ONLY_IT)

    assert status == 2, said
    assert "host1 does not take 2: " in said
    assert "no protector" in said.partition("host1 does not take 2: ")[2].partition("PLAY RECAP")[0]
    assert host.current == "1"
