"""Attackers side by side on one instance that runs: each two of them, and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import combinations
from pathlib import Path

import pytest

from tests import needs
from tests.hostile import instance as false
from tests.hostile import remote
from tests.hostile.attacked import GOOD, NAME, Attacked
from tests.hostile.stranger import made_by, own_folder, too_much, tried
from tests.running import wait_gone
from tests.scenarios.tools import worker
from tests.unit.exporter.conftest import Exporter

pytestmark = pytest.mark.timeout(600)

#: What the worker does beside the others.
WORKERS_ATTACK = "says_the_worst"


class Scene:
    """The instance, the exporter that asks all instances, and a folder for the rest."""

    def __init__(self, one: Attacked, exporter: Exporter, folder: Path) -> None:
        self.one, self.exporter, self.folder = one, exporter, folder

    @contextmanager
    def worker(self) -> Iterator[None]:
        """One of two workers; it ends with its generation."""
        self.one.release.becomes(*worker("hostile", WORKERS_ATTACK))
        self.one.start.reload()
        yield
        self.one.release.becomes(*GOOD)
        self.one.start.reload()
        assert wait_gone(self.one.workers(2)) == []
        self.one.start.wait_for("event=drained generation=2")

    @contextmanager
    def false_instance(self) -> Iterator[None]:
        """One of each kind, which every survey finds."""
        with ExitStack() as stack:
            for name, behave in false.BEHAVIOURS.items():
                path = self.one.control.with_name(f"{name}.control")
                stack.enter_context(false.instance(path, behave))
            yield

    def remote_client(self) -> AbstractContextManager[None]:
        return remote.attack(self.exporter)

    @contextmanager
    def local_user(self) -> Iterator[None]:
        """It holds what it may while the others attack."""
        needs.another_user()
        pids = [*self.one.processes(), self.exporter.process.pid]
        paths = made_by(self.one, self.exporter.process.pid)
        with tried(paths, pids, own_folder(self.folder)) as done:
            yield
        assert too_much(done) == set()


ATTACKERS = ("remote_client", "false_instance", "worker", "local_user")
#: The first one is run by `make test`.
TOGETHER = (*[*combinations(ATTACKERS, 2)][::-1], ATTACKERS[:3], ATTACKERS)


@pytest.mark.parametrize("attackers", TOGETHER, ids="+".join)
@pytest.mark.costly
def test_an_instance_is_unharmed_by(
    attacked: Attacked,
    exporter: Callable[..., Exporter],
    tmp_path: Path,
    attackers: tuple[str, ...],
) -> None:
    one = attacked.up("--workers", "2")
    asked = exporter("--web", "127.0.0.1:0", "--agent", "127.0.0.1:0")
    remote.is_answered(asked, NAME)
    scene = Scene(one, asked, tmp_path)
    with one.unharmed(asked.process.pid):
        with ExitStack() as attacks:
            for each in attackers:
                attacks.enter_context(getattr(scene, each)())
            one.serves()
            one.is_listed()
            remote.is_answered(asked, NAME)
        remote.is_answered(asked, NAME)
    one.works()
