"""Many steps of a simulated world, and each seed that has once found a fault of ours.

In a process of its own: the names inside the protector's modules are replaced for it, and the
order of its sets of words is fixed.  `make soak` runs more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rounds import MANY, rounds
from tests.simulation.world import World

ROOT = Path(__file__).parents[2]
REGRESSIONS = Path(__file__).with_name("regressions.txt")
PARTS = rounds(1, 4)
#: Those that found a fault had the usual 2,000; many of them begin alike.
LIFE = rounds(300, 2000)
STEPS = rounds(15_000, 250_000)
#: Kinds of regressions that are of lives with rollouts.
ROLLED = ("rolled-connection", "rolled-listener")
#: Those of lives with releases.
DEPLOYED = ("deployed-connection", "deployed-listener")
#: Of the calls in stories, and lives that come off those: of some stories, so that all verbs do.
SHARE, STORIED = ("1", "2000") if MANY else ("0.005", "24")
#: Releases are no part of a delivery: stories try both deliveries.
EITHER_IN_TEST_ALL = pytest.mark.parametrize(
    "handoff", ["listener", pytest.param("connection", marks=pytest.mark.costly)]
)


def simulate(*arguments: str) -> str:
    """Run `python -m tests.simulation`; its last line says what was seen."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(rounds(300, 3600))  # seconds of a processor, which may be a busy one
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("handoff", ["connection", "listener"])
def test_many_steps_lose_nothing_and_leave_nothing(handoff: str, part: int) -> None:
    first = str(1 + part * 1000)
    seen = simulate("--handoff", handoff, "--first", first, "--total", str(STEPS))

    for what in ("kills", "faults", "upgrades", "unguarded"):  # it has been tried
        assert f"'{what}': 0" not in seen


@pytest.mark.timeout(rounds(300, 3600))
@pytest.mark.parametrize("handoff", ["connection", "listener"])
def test_rollouts_share_and_stay_within_their_bound(handoff: str) -> None:
    lives = str(rounds(20, 500))
    seen = simulate("--rollouts", "--verbose", "--handoff", handoff, "--lives", lives)

    for stage in ("canary: share", "canary: all clients", "rolling: the others"):
        assert f"'{stage}'" in seen
    assert "'killed in canary: " in seen or "'killed in rolling: " in seen


@pytest.mark.timeout(rounds(300, 3600))
@EITHER_IN_TEST_ALL
def test_current_names_only_what_was_proved(handoff: str) -> None:
    """Releases are deployed and rolled back; each write may fail, or end the protector."""
    lives = str(rounds(12, 500))
    seen = simulate(
        "--deploys", "--verbose", "--handoff", handoff, "--first", "16", "--lives", lives
    )

    for event in ("deploy", "rollback", "current moved", "history-not-written"):
        assert f"'{event}': " in seen


@pytest.mark.timeout(rounds(300, 3600))
@pytest.mark.parametrize("handoff", ["connection", "listener"])
def test_an_order_to_end_evenly_outlives_kills_and_only_a_stop_shortens_it(handoff: str) -> None:
    lives = str(rounds(12, 500))
    seen = simulate("--spreads", "--verbose", "--handoff", handoff, "--lives", lives)

    for event in ("ordered at a drain", "ordered at a stop", "killed in a spread"):
        assert f"'{event}': " in seen


def regressions(kind: str) -> list[str]:
    lines = REGRESSIONS.read_text(encoding="ascii").splitlines()
    found = [line.split()[:2] for line in lines if line and not line.startswith("#")]
    return [seed for its, seed in found if its == kind]


@pytest.mark.parametrize("kind", ["connection", "listener", *ROLLED, *DEPLOYED])
def test_a_seed_that_has_once_failed(kind: str) -> None:
    """All in one process; what it says of one that fails begins with its seed."""
    seeds, handoff = regressions(kind), kind.rpartition("-")[2]
    words = ("--rollouts",) if kind in ROLLED else ("--deploys",) if kind in DEPLOYED else ()

    told = simulate(
        *words, "--verbose", "--handoff", handoff, "--steps", str(LIFE), "--seed", *seeds
    )

    assert f"seeds {seeds[0]} to {seeds[-1]}" in told


@pytest.mark.slow
@pytest.mark.timeout(rounds(300, 3600))
@EITHER_IN_TEST_ALL
def test_each_step_of_a_deploy_is_a_kill_and_a_failure(handoff: str) -> None:
    words = ("--deploys", "--each-step", "--handoff", handoff)

    assert "failed: 0" in simulate(*words, "--share", SHARE, "--lives", STORIED)


@pytest.mark.slow
@pytest.mark.timeout(rounds(300, 3600))
@pytest.mark.parametrize("handoff", ["connection", "listener"])
def test_each_step_of_a_story_is_a_kill_and_a_failure(handoff: str) -> None:
    words = ("--each-step", "--handoff", handoff)
    output = simulate(*words, "--share", SHARE, "--lives", STORIED)

    for verb in ("open", "close_listeners", "release"):
        assert f"Delivery.{verb}\n" in output
    assert "killed at 0 of" not in output.splitlines()[-2]


@pytest.mark.costly
@pytest.mark.parametrize("handoff", ["connection", "listener"])
def test_the_same_seed_is_the_same_life(handoff: str) -> None:
    words = ("--handoff", handoff, "--seed", "7", "--steps", "500")

    assert simulate(*words) == simulate(*words)


def test_a_verdict_may_be_said_again_only_after_a_kill_that_the_state_does_not_tell_of_it() -> None:
    """A decision that a killed program had begun to carry out is repeated as a whole."""
    world = World(1, 0, None)
    for _ in range(2):
        world._said("dry-run", {"generation": 5})
        world._said("dry-run-failed", {"generation": 5})
        world._said("reloading", {"generation": None})
        world._forget_unsaved()
    world._said("dry-run-failed", {"generation": 5})
    world._said("dry-run", {"generation": 6})

    with pytest.raises(AssertionError, match="amid another reload"):
        world._said("dry-run-failed", {"generation": 5})
