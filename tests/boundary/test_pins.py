"""requirements/release.txt holds all that a release is made of, each with its hashes.

No network is asked: what each package needs in turn stands in the file.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.running import ROOT
from tests.together import together

FILE = ROOT / "requirements" / "release.txt"
#: Several versions of CPython and no other system: the markers that may matter.
SURROUNDINGS = [
    {"python_version": version, "sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    for version in ("3.11", "3.12", "3.13", "3.14")
]


@dataclass
class Pin:
    version: str
    needs: list[Requirement]
    hashes: list[str]


def pins() -> dict[str, Pin]:
    found: dict[str, Pin] = {}
    for part in re.split(r"^(?=# needs: )", FILE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        told, pinned, *rest = part.replace(" \\\n", "\n").rstrip("\n").split("\n")
        words = told.removeprefix("# needs: ")
        needs = [] if words == "nothing" else [Requirement(w) for w in re.split(r", (?=\w)", words)]
        name, equals, version = pinned.partition("==")
        assert equals, pinned
        found[canonicalize_name(name)] = Pin(version, needs, [line.strip() for line in rest])
    return found


def wanted() -> list[Requirement]:
    """What the two projects name, but themselves."""
    found = []
    for path in (ROOT / "pyproject.toml", ROOT / "client_lib" / "pyproject.toml"):
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        found += project["build-system"]["requires"] + project["project"]["dependencies"]
    return [Requirement(each) for each in found if not each.startswith("socketprotector-client")]


def applies(requirement: Requirement) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate(dict(each)) for each in SURROUNDINGS)


@together("requirement", wanted())
def test_what_the_projects_need_is_pinned_to_a_version_that_they_take(
    requirement: Requirement,
) -> None:
    pin = pins()[canonicalize_name(requirement.name)]

    assert requirement.specifier.contains(pin.version)


def test_what_that_needs_is_pinned_too_and_nothing_else_is() -> None:
    pinned = pins()
    reached: set[str] = set()
    waiting = wanted()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if not applies(requirement):
            continue
        assert requirement.specifier.contains(pinned[name].version), requirement
        if name not in reached:
            reached.add(name)
            waiting += pinned[name].needs

    assert reached == set(pinned), "run tools/pin.py"


def test_each_has_the_hash_of_at_least_one_wheel() -> None:
    for name, pin in pins().items():
        assert pin.hashes, name
        for each in pin.hashes:
            assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each), f"{name}: {each}"
        assert len(set(pin.hashes)) == len(pin.hashes)


def test_no_place_to_fetch_from_is_written_down() -> None:
    assert "://" not in FILE.read_text(encoding="utf-8")
