"""Bad remote clients of the exporter, its page and its agent take nothing from good ones.

What tests/unit/exporter/test_visits.py and test_agent.py show of each limit is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.hostile import remote
from tests.hostile.attacked import NAME, Attacked
from tests.procfs import sleeps
from tests.running import eventually
from tests.unit.exporter.conftest import Exporter

pytestmark = pytest.mark.timeout(120)


#: The first one is run by `make test`.
NAMES = (("chunks without end",), ("wrong heads", "odd methods"), (*remote.BEHAVIOURS,))


@pytest.mark.parametrize("names", NAMES, ids=["chunks", "words", "all"])
def test_good_clients_are_answered_beside_bad_ones(
    attacked: Attacked, exporter: Callable[..., Exporter], names: tuple[str, ...]
) -> None:
    one = attacked.up()
    asked = exporter("--web", "127.0.0.1:0", "--agent", "127.0.0.1:0")
    remote.is_answered(asked, NAME)
    lines = len(asked.said.seen)
    with one.unharmed(asked.process.pid):
        with remote.attack(asked, names):
            remote.is_answered(asked, NAME)
            one.serves()
        remote.is_answered(asked, NAME)
    assert len(asked.said.seen) == lines
    eventually(lambda: sleeps(asked.process.pid), "an exporter that rests")
    one.works()
