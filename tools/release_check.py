#!/usr/bin/env python3
"""Check whether a tag can be released:  tools/release_check.py TAG REPOSITORY

The tag must be v and the version in each distribution, in each package with a version, and in a
section of CHANGELOG.md.  The files of Debian, rpm and Arch must have this version.  The links must
lead to that repository.  Requirements among the distributions must have this version.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: The files of other packages, and where each has the version.
PACKAGES = {
    "packaging/debian/changelog": r"\Asocketprotector \((.+)-1\)",
    "packaging/rpm/socketprotector.spec": r"^Version: +(.+)$",
    "packaging/arch/PKGBUILD": r"^pkgver=(.+)$",
}


def mistakes(tag: str, repository: str) -> list[str]:
    """Return the mistakes, each as one line."""
    found = []
    version = tag.removeprefix("v")
    if tag == version:
        found.append(f"tag {tag}: write v in front of the version")
    for name, package in (
        (".", "socketprotector"),
        ("client_lib", "socketprotector_client"),
        ("exporter", "socketprotector_exporter"),
    ):
        folder = ROOT / name
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        what = project["name"]
        if project["version"] != version:
            found.append(f"{what}: version {project['version']} in pyproject.toml, tag {tag}")
        declared = re.search(
            r'^__version__ = "([^"]+)"', (folder / package / "__init__.py").read_text(), re.M
        )
        if declared and declared[1] != version:
            found.append(f"{what}: __version__ is {declared[1]}, tag {tag}")
        if project["urls"]["Source"].lower() != repository.lower():
            found.append(f"{what}: urls.Source is {project['urls']['Source']}, not {repository}")
        extras = project.get("optional-dependencies", {}).values()
        needs = [*project["dependencies"], *(each for extra in extras for each in extra)]
        found += [
            f"{what}: needs {each}, not version {version}"
            for each in needs
            if each.startswith("socketprotector") and not each.endswith(f"=={version}")
        ]
    for name, place in PACKAGES.items():
        written = re.search(place, (ROOT / name).read_text(encoding="utf-8"), re.M)
        if written is None or written[1] != version:
            found.append(f"{name}: version {written and written[1]}, tag {tag}")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[?{re.escape(version)}\]?( |$)", changes, re.M):
        found.append(f"CHANGELOG.md: no section {version}")
    return found


def main(words: list[str]) -> int:
    """Print the mistakes; return the exit status."""
    if len(words) != 2:
        print("usage: tools/release_check.py TAG REPOSITORY", file=sys.stderr)
        return 2
    found = mistakes(*words)
    for each in found:
        print(f"release-check: {each}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
