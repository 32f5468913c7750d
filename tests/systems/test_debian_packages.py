"""Debian 12's own Python packages, the oldest that the bounds of pyproject.toml let in."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import needs
from tests.running import ROOT
from tests.systems.life import Surroundings, lived

PYTHON = "/usr/bin/python3"
#: Debian's package of each that is needed, and where its Python looks for them.
PACKAGES = {
    "click": "python3-click",
    "lockfile": "python3-lockfile",
    "prometheus-client": "python3-prometheus-client",
    "psutil": "python3-psutil",
    "python-daemon": "python3-daemon",
    "rich": "python3-rich",
}
FOLDER = "/usr/lib/python3/dist-packages"


def needed() -> dict[str, Requirement]:
    """What the project needs, and its exporter, by name."""
    found: dict[str, Requirement] = {}
    for folder in (ROOT, ROOT / "exporter"):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        found |= {each.name: each for each in map(Requirement, project["dependencies"])}
    return {name: each for name, each in found.items() if not name.startswith("socketprotector")}


@pytest.fixture(scope="module")
def versions() -> dict[str, str]:
    """What Debian 12 has of them; skips where this is no Debian 12, or it is not installed."""
    release = Path("/etc/os-release")
    if not release.exists() or 'VERSION_ID="12"' not in release.read_text(encoding="utf-8"):
        needs.skip("Debian 12, or make test-debian")
    script = (
        "import json, sys; from importlib.metadata import version;"
        "print(json.dumps({each: version(each) for each in sys.argv[1:]}))"
    )
    words = (PYTHON, "-I", "-c", script, *PACKAGES)
    done = subprocess.run(words, capture_output=True, check=False, text=True)
    if done.returncode:
        needs.skip(", ".join(PACKAGES.values()))
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_the_bounds_begin_at_what_debian_has(versions: dict[str, str]) -> None:
    wanted = needed()

    assert set(wanted) == set(PACKAGES)
    for name, requirement in wanted.items():
        assert str(requirement.specifier) == f">={versions[name]}", name


@pytest.mark.parametrize("mode", ["connection", "listener"])
@pytest.mark.costly
def test_a_whole_life_with_them(
    tmp_path: Path, marked_environment: dict[str, str], versions: dict[str, str], mode: str
) -> None:
    path = f"{ROOT}:{ROOT / 'client_lib'}:{ROOT / 'exporter'}"
    around = Surroundings(
        tmp_path,
        marked_environment,
        python=(PYTHON, "-P"),
        mode=mode,
        more={"PYTHONPATH": path},
    )

    told = around.run("--version", module="socketprotector_exporter")
    assert told.returncode == 0, told.stderr
    lived(around)
