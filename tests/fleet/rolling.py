"""Releases to five hosts behind HAProxy by Ansible, with the files of deploy/: what goes well.

make test-fleet [FLEET_RELEASES=20]     (root; minutes)

Not collected by itself: the name is no test's.  No test lets a timing decide.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest

from tests.fleet import needs
from tests.fleet.hosts import Fleet, Load, fleet, wait

pytestmark = needs.marks

RELEASES = int(os.environ.get("FLEET_RELEASES", "2"))


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    options = ("--settle", "1s", "--settle-check", "http:/healthz")
    with fleet(tmp_path_factory.mktemp("fleet"), *options) as made:
        yield made


@pytest.fixture
def load(five: Fleet) -> Iterator[Load]:
    made = Load(five.balancer, 100)
    yield made
    made.end()


def other(five: Fleet) -> str:
    """A good version that no host serves."""
    return "3" if "2" in five.versions else "2"


def no_request_failed(load: Load) -> None:
    told = load.told()
    assert told.failures == []
    assert told.answered > 0
    print(f"{told.answered} answered, 0 failed, the longest took {told.longest_s * 1000:.0f} ms")


@pytest.mark.parametrize("number", range(RELEASES))
def test_a_release_fails_no_request(five: Fleet, load: Load, number: int) -> None:
    version = other(five)

    status, said = five.release(version)

    assert status == 0, said
    assert five.versions == [version] * five.SIZE
    modes = [each.mode(version) for each in five.hosts]
    assert modes == ["755"] * five.SIZE, "not what the login's umask would make of it"
    no_request_failed(load)


def test_a_second_run_changes_nothing(five: Fleet) -> None:
    version = other(five)
    assert five.release(version)[0] == 0
    reloads = [each.reloads for each in five.hosts]

    status, said = five.release(version)

    assert status == 0, said
    assert re.findall(r"changed=(\d+)", said) == ["0"] * (five.SIZE + 1)
    assert [each.reloads for each in five.hosts] == reloads


def refused_s(five: Fleet) -> float:
    """Release the bad one, which stops at its first host; return after how many seconds there."""
    before = five.versions
    reloads = [each.reloads for each in five.hosts]

    status, said = five.release("bad")

    assert status == 2, said
    assert "host1 does not take bad: " in said
    assert "exited with status 1 before it was ready" in said
    assert "release bad: no such table: customers" in said
    assert five.versions == before
    assert [each.reloads for each in five.hosts[1:]] == reloads[1:]
    first, *others = five.hosts
    assert first.current == before[0]
    assert not any(each.has("bad") for each in others)
    tried = first.status["reloads"][-1]
    assert tried["result"] == "failed"
    return float(tried["ended_at"] - tried["began_at"])


def test_a_bad_release_stops_at_its_first_host_and_gets_no_client(five: Fleet, load: Load) -> None:
    # Within a second, once: how busy this machine is decides nothing.
    seconds = refused_s(five)
    for _ in range(4):
        if seconds < 1:
            break
        seconds = refused_s(five)

    assert seconds < 1
    no_request_failed(load)
    print(f"stopped after {seconds:.2f} s")


def test_a_release_goes_on_while_the_balancer_is_reloaded(five: Fleet, load: Load) -> None:
    version = other(five)
    workers = five.balancer.workers
    releasing = five.releasing(version)
    wait(lambda: five.hosts[0].version == version, "the first one")

    five.balancer.signal(five.balancer.haproxy, signal.SIGUSR2)
    wait(lambda: five.balancer.workers > workers, "HAProxy has started another worker")
    assert releasing.poll() is None
    said, _ = releasing.communicate(timeout=300)

    assert releasing.returncode == 0, said
    assert five.versions == [version] * five.SIZE
    no_request_failed(load)


def test_a_second_release_beside_one_is_refused(five: Fleet) -> None:
    version = other(five)
    first = five.releasing(version)
    there = f"/srv/web/releases/{version}/daemon"
    five.hosts[0].run("rm", "-r", f"/srv/web/releases/{version}")
    wait(lambda: five.hosts[0].run("test", "-e", there).returncode == 0, "it has begun")

    status, said = five.release("2")

    assert (status, said) == (
        75,
        f"release: another release is under way (lock: {five.folder})\n",
    )
    assert first.communicate(timeout=300)
    assert first.returncode == 0
    assert five.versions == [version] * five.SIZE


def test_a_host_that_is_left_out_on_purpose_is_named_and_not_touched(five: Fleet) -> None:
    version, before = other(five), five.versions
    inventory = five.folder / "excluded.yml"
    inventory.write_text("excluded:\n  hosts:\n    host3:\n")

    status, said = five.release(version, "-i", str(inventory))

    assert status == 0, said
    assert "left out on purpose: host3" in said
    assert five.versions == [version, version, before[2], version, version]
