"""Each system is booted once; what its checks said is shown at the end, passed or not."""

from __future__ import annotations

import pytest

from tests import needs

from .machine import SYSTEMS, Said, System, boot, missing

_SAID = pytest.StashKey[dict[str, Said]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SAID] = {}


@pytest.fixture(scope="session", params=SYSTEMS, ids=lambda system: system.name)
def machine(request: pytest.FixtureRequest) -> tuple[System, Said]:
    """What one system has said.  Fails where such a machine cannot be run at all."""
    if trouble := missing():
        pytest.fail(f"NOT TESTED: {trouble}; `make test-vm` installs it as root", pytrace=False)
    system: System = request.param
    said = boot(system, _wanted(request.session.items, system))
    request.config.stash[_SAID][system.name] = said
    if system.changes and not said.system:
        needs.skip(f"a {system.name} that comes up", said.trouble)
    return system, said


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, said in terminalreporter.config.stash.get(_SAID, {}).items():
        terminalreporter.section(f"{name}, in {said.took_s:.0f} s")
        terminalreporter.line(", ".join(f"{key} {value}" for key, value in said.system.items()))
        for check, what in said.checks.items():
            terminalreporter.line(f"{what['outcome']} ({what['took_s']} s): {check}")
            if what["outcome"] != "failed":
                for line in what["said"]:
                    terminalreporter.line(f"    {line}")


def _wanted(items: list[pytest.Item], system: System) -> list[str]:
    """The names of the checks that were not deselected."""
    calls = [item.callspec.params for item in items if isinstance(item, pytest.Function)]
    return [str(each["name"]) for each in calls if each.get("machine") is system and "name" in each]
