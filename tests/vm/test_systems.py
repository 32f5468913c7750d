"""The shipped units, and the protector, on real systems: systemd is PID 1 of an emulated machine.

No timing is judged.  What is checked is in checks.py and installed.py, which run inside.
"""

from __future__ import annotations

import pytest

from tests import needs

from .catalogue import CHECKS
from .machine import Said, System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5 * 3600)]


def test_the_system_comes_up_says_everything_and_powers_off(machine: tuple[System, Said]) -> None:
    system, said = machine

    assert said.trouble == "", said.trouble
    assert said.done
    assert said.status == 0
    assert said.system["kernel"].startswith(system.kernel)


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_real_system(machine: tuple[System, Said], name: str) -> None:
    _, said = machine

    found = said.checks.get(name)
    assert found is not None, f"not said: {said.trouble or 'the machine ended before'}"
    if found["outcome"] == "not run":
        needs.skip("something in the machine", found["said"][-1])
    assert found["outcome"] == "passed", "\n".join([*found["said"], found["journal"]])
