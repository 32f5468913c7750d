#!/usr/bin/env python3
"""Write requirements/release.txt: the requirements of a release, pinned with their wheels' hashes.

    tools/pin.py        (queries the package index that pip is configured for; changes nothing else)

They are the run-time dependencies and the build backend of both packages, with their own
requirements; for the wheels of every Linux platform here and CPython 3.11 and later.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "requirements" / "release.txt"
PROJECTS = (ROOT / "pyproject.toml", ROOT / "client_lib" / "pyproject.toml")
OWN = "socketprotector-client"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
PLATFORMS = tuple(
    tuple(f"{system}_{machine}" for system in systems)
    for machine in MACHINES
    for systems in (
        ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux2010"),
        ("musllinux_1_2", "musllinux_1_1"),
    )
)
HEAD = """\
# What a release is built with and runs with; the wheels of CPython >= 3.11 on Linux.
# Made by tools/pin.py; tests/boundary/test_pins.py checks it against pyproject.toml.
#
#     pip install --require-hashes --only-binary :all: -r requirements/release.txt
#     pip install --no-deps --no-build-isolation ./client_lib .
"""


def pip(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return done.stdout


def wanted() -> list[str]:
    """Return the direct requirements of the two projects."""
    found = []
    for path in PROJECTS:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        found += project["build-system"]["requires"]
        found += project["project"]["dependencies"]
    return sorted({each for each in found if not each.startswith(OWN)})


def pinned() -> dict[str, str]:
    """Return NAME==VERSION of all direct and indirect requirements -> its own requirements."""
    words = ("install", "--dry-run", "--ignore-installed", "--only-binary", ":all:")
    report = json.loads(pip(*words, "--report", "-", *wanted()))
    found = {}
    for each in (one["metadata"] for one in report["install"]):
        needs = [need for need in each.get("requires_dist", ()) if "extra ==" not in need]
        name = each["name"].lower().replace("_", "-")
        found[f"{name}=={each['version']}"] = ", ".join(sorted(needs)) or "nothing"
    return dict(sorted(found.items()))


def hashes(requirement: str) -> list[str]:
    """Return the hashes of all installable wheels of a requirement."""
    with tempfile.TemporaryDirectory() as name:
        for python in PYTHONS:
            for platforms in PLATFORMS:
                words = [word for each in platforms for word in ("--platform", each)]
                where = ("--only-binary", ":all:", "--no-deps", "--dest", name)
                pip("download", *where, "--python-version", python, *words, requirement)
        return sorted(
            hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(name).iterdir()
        )


def main() -> None:
    parts = []
    for requirement, needs in pinned().items():
        lines = [
            f"# needs: {needs}\n{requirement}",
            *(f"    --hash=sha256:{each}" for each in hashes(requirement)),
        ]
        parts.append(" \\\n".join(lines) + "\n")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(HEAD + "".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
