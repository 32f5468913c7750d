"""The packages for rpm and for Arch Linux: built, linted, installed, used, upgraded and removed.

    make packages [DEBIAN_ROOTS=FOLDER]     (root; some minutes)

Not collected by itself: the name is no test's.  All of it happens on a Debian, with its rpmbuild
and makepkg and in a Debian's root: on Fedora and on Arch Linux themselves it is not tested.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.packages.debian_roots import debian_roots
from tests.packages.dists import EPOCH, VERSION
from tests.running import ROOT, output_of

TOOLS = Path(os.environ.get("PACKAGING_TOOLS", ROOT / ".venv" / "packaging")) / "bin"
NEXT = "0.9.1"
#: The Debian whose Python is the one that the packages are built with.
SUITE = {(3, 11): "bookworm", (3, 13): "trixie"}.get(sys.version_info[:2], "")
NAMESPACES = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


#: Run a command that succeeds; return what it says.
run = functools.partial(output_of, SOURCE_DATE_EPOCH=EPOCH)

pytestmark = [
    needs.ROOT,
    needs.unless(bool(SUITE), "a Debian with this version of Python"),
    needs.unless(TOOLS.is_dir(), f"the tools in {TOOLS}"),
    needs.programs("debootstrap"),
    pytest.mark.timeout(1800),
]
root_of = pytest.fixture(scope="session")(debian_roots)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this version, of a next one, and what else each is built from."""
    folder = tmp_path_factory.mktemp("sources")
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = [name for name in tracked.split("\0") if name and (ROOT / name).exists()]
    for version in (VERSION, NEXT):
        tree = folder / version
        for name in names:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
        for name in (
            *("pyproject.toml", "client_lib/pyproject.toml", "exporter/pyproject.toml"),
            "socketprotector/__init__.py",
            *("packaging/rpm/socketprotector.spec", "packaging/arch/PKGBUILD"),
        ):
            text = (tree / name).read_text(encoding="utf-8")
            assert VERSION in text, name
            (tree / name).write_text(text.replace(VERSION, version), encoding="utf-8")
        run(TOOLS / "python", "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=tree)
    return folder


@pytest.fixture(scope="session")
def rpms(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rpms")
    for which, version in (("good", VERSION), ("next", NEXT)):
        with tempfile.TemporaryDirectory() as top:
            run(
                *("rpmbuild", "-bb", "--nodeps", "--define", f"_topdir {top}"),
                *("--define", f"_sourcedir {sources}", "--define", f"python3 {TOOLS / 'python'}"),
                sources / version / "packaging" / "rpm" / "socketprotector.spec",
            )
            shutil.copytree(Path(top, "RPMS", "noarch"), folder / which)
    return folder


@pytest.fixture(scope="session")
def archives(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages for pacman, made by makepkg as a user that is not root."""
    folder = tmp_path_factory.mktemp("arch")
    for which, version in (("good", VERSION), ("next", NEXT)):
        work = tmp_path_factory.mktemp("makepkg")
        for each in (sources / version / "packaging" / "arch").iterdir():
            shutil.copy(each, work)
        shutil.copy(sources / f"socketprotector-{version}.tar.gz", work)
        run(
            *("unshare", "--user", "--map-user=1000", "--map-group=1000"),
            *("makepkg", "--nodeps", "--skipinteg", "--noconfirm"),
            cwd=work,
            PATH=f"{TOOLS}:/usr/bin:/bin",
            PKGEXT=".pkg.tar.gz",
        )
        (folder / which).mkdir()
        for each in work.glob("*.pkg.tar.gz"):
            shutil.copy(each, folder / which)
    return folder


def lived(manager: str, root: Path, folder: Path) -> None:
    words = (sys.executable, "-m", "tests.packages.life", manager, root, folder)
    told = run("unshare", *NAMESPACES, *words)
    print(told)
    assert told.endswith("LIVED\n")


@needs.programs("rpmbuild", "rpmlint")
def test_rpmlint_finds_neither_errors_nor_warnings(rpms: Path) -> None:
    config = ROOT / "packaging" / "rpm" / "rpmlint.toml"
    told = run("rpmlint", "--config", config, *sorted((rpms / "good").iterdir()))

    assert re.search(r"\b0 errors, 0 warnings", told), told


@needs.programs("rpmbuild", "rpm")
def test_a_whole_life_as_rpm(root_of: Callable[..., Path], rpms: Path) -> None:
    assert len([*(rpms / "good").iterdir()]) == 3
    lived("rpm", root_of(SUITE), rpms)


@needs.programs("makepkg", "pacman")
def test_a_whole_life_under_pacman(root_of: Callable[..., Path], archives: Path) -> None:
    assert len([*(archives / "good").iterdir()]) == 3
    lived("pacman", root_of(SUITE), archives)


@needs.programs("makepkg")
def test_makepkg_reads_what_is_said_of_the_packages() -> None:
    words = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
    told = run(*words, "makepkg", "--printsrcinfo", cwd=ROOT / "packaging" / "arch")

    assert f"pkgver = {VERSION}" in told
    assert told.count("pkgname = ") == 3
