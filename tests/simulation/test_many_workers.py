"""All of the protector at once: what concerns one worker costs what one costs.

Counted in steps of the interpreter inside the protector's own modules, which are the same on a
busy machine.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import socketprotector
from socketprotector.core.fleet import Policy
from socketprotector.core.workers import AT_ONCE
from socketprotector.daemon.checkpoint import Checkpoint
from socketprotector.daemon.effects import Effects
from socketprotector.model.settings import Origin
from socketprotector.system.state_file import StateFile
from tests.rounds import rounds
from tests.simulation.world import World
from tests.steps import steps_of

OURS = str(Path(socketprotector.__file__).parent)
FEW, MANY = rounds(3, 5), rounds(24, 40)
#: More than in proportion: what the halves of a longer list and its one look cost more.
SLACK = 1.3


class Quiet(World):
    """A life in which all goes well: a start, a reload, a crash of all workers, a stop."""

    UNUSUAL = False

    def __init__(self, workers: int, fd_store: str) -> None:
        super().__init__(seed=1, steps=0)
        self.fd_store = fd_store
        self.settings = replace(
            self.settings,
            workers=workers,
            policy=Policy(),
            ready_after_s=None,
            guarded=fd_store == "guard",
        )
        self._faulty = self._deadly = 0.0
        self._to_come = [self._reload, self._crash_all]

    def _check(self) -> None:
        pass  # it would be counted

    def _interfere_later(self) -> None:
        self.kernel.quiet_calls = 1 << 62  # else one of the workers may shut the channel down

    def _reload(self) -> None:
        super()._signal(signal.SIGHUP)

    def _crash_all(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """Come to rest again before the last signal."""
        if self._to_come:
            self._stopped = False
            self._to_come.pop(0)()
        else:
            super()._signal(number)


def test_what_follows_from_nothing_is_not_written_down_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A start, a reload, a crash, a stop: three in each worker's place begin and end."""
    saved = looked_at = 0
    save, snapshot = Checkpoint.save, Effects.snapshot

    def saving(checkpoint: Checkpoint) -> bool:
        nonlocal saved
        saved += 1
        return save(checkpoint)

    def looking(effects: Effects, fleet: Any, actions: Any) -> Any:
        nonlocal looked_at
        looked_at += len(actions)
        return snapshot(effects, fleet, actions)

    monkeypatch.setattr(Checkpoint, "save", saving)
    monkeypatch.setattr(Effects, "snapshot", looking)
    Quiet(MANY, "guard").live()

    # Spawned, ready, ended, and one more; and as the loop turns between a few and a few.
    assert saved < 3 * (4 * MANY + MANY // AT_ONCE)
    # And not all that is still to be spawned for each of them, but those of one turn of the loop.
    assert looked_at < (10 + AT_ONCE // 2) * MANY


def test_settings_that_were_read_again_are_not_written_down_at_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once as those that are tried; of what holds then only that is written in which it differs."""
    written: list[bytes] = []
    write = StateFile.write_change

    def noted(file: StateFile, payload: bytes) -> None:
        written.append(payload)
        write(file, payload)

    monkeypatch.setattr(StateFile, "write_change", noted)
    life = Quiet(MANY, "guard")
    life.settings = replace(life.settings, origin=Origin(configured=True))
    life.live()

    assert life.events["configured"] == 1
    assert len(written) > 2
    assert sum(each.count(b'"c":"Settings"') for each in written) == 1


@pytest.mark.parametrize("fd_store", ["guard", "systemd", "none"])
@pytest.mark.costly
def test_eight_times_the_workers_take_eight_times_the_steps(fd_store: str) -> None:
    few, many = (steps_of(Quiet(workers, fd_store).live, OURS) for workers in (FEW, MANY))

    assert many < few * MANY / FEW * SLACK
