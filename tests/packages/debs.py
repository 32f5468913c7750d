"""The Debian packages for these tests: as they are built from these sources, and in other versions.

Which the tests of installed systems take: one that is newer, a newer one still, and a broken one.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.packages.dists import VERSION
from tests.running import ROOT

#: Begun lines of our programs, and the one word that each may go on with.
COMPLETED = {
    "SocketProtector --gua": "--guard",
    "socketprotector dem": "demo",
    "socketprotectorctl rea": "ready",
    "socketprotector-exporter --tls-c": "--tls-cert",
}
_MODULES = "usr/lib/python3/dist-packages/socketprotector"
#: What builds them, and the packages that have it.
_NEEDED = {"dpkg-buildpackage": "dpkg-dev", "dh": "debhelper", "pybuild": "dh-python"}
_SAID = f'__version__ = "{VERSION}"'
_MAIN = "def main() -> None:\n"
#: Of each: its version, and what it has instead of what in one of its modules.
_OTHERS = {
    "next": ("0.9.1-1", "__init__.py", _SAID, '__version__ = "0.9.1"'),
    "after": ("0.9.2-1", "__init__.py", _SAID, '__version__ = "0.9.2"'),
    "broken": (
        *("0.9.3-1", "daemon/resident.py", _MAIN),
        f'{_MAIN}    sys.exit("a broken release")\n',
    ),
}


def missing() -> str:
    """Say what is missing here to build them; an empty text if nothing is."""
    packages = [package for program, package in _NEEDED.items() if not shutil.which(program)]
    return f"apt-get install {' '.join(packages)}" if packages else ""


def run(*words: str | Path) -> str:
    """Run a command that succeeds; return what it says."""
    done = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(folder: Path) -> None:
    """Build the packages from these sources into a folder."""
    run(ROOT / "packaging" / "build-deb", folder)


def versions(built: Path, folder: Path) -> None:
    """Make folders of packages: `good`, `next` and `after`, each newer, and `broken`, the newest.

    built: where build() has put them.
    """
    for which in ("good", *_OTHERS):
        (folder / which).mkdir(parents=True)
        for package in built.glob("*.deb"):
            if which == "good":
                shutil.copy(package, folder / which)
            else:
                _changed(package, folder / which, *_OTHERS[which])


def _changed(package: Path, folder: Path, version: str, module: str, before: str, now: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name, "tree")
        run("dpkg-deb", "-R", package, tree)
        control = tree / "DEBIAN" / "control"
        text = control.read_text(encoding="utf-8")
        control.write_text(text.replace(f"{VERSION}-1", version), encoding="utf-8")
        file = tree / _MODULES / module
        if file.exists():
            text = file.read_text(encoding="utf-8")
            assert before in text
            file.write_text(text.replace(before, now, 1), encoding="utf-8")
        run("dpkg-deb", "--root-owner-group", "-b", tree, folder)
